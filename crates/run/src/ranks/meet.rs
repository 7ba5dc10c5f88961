//! How ranks without MPI find each other: rank 0 listens where `MASTER_ADDR` and `MASTER_PORT` say, the others call it, it
//! tells them of each other, and then each has two connections to every other: one for the work, one for what is said beside it.
//!
//! Whoever calls shows a [`Card`]. What does not begin like one is a stranger's and gets no answer; a card that does not belong
//! here is refused with a word of why, and the others go on.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use crate::Error;

/// A rank that does not come in this time is missing.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How much longer a rank waits for what rank 0 says of the others.
const MARGIN: Duration = Duration::from_secs(5);
/// Until two ranks that rank 0 told of each other are connected.
const TOGETHER: Duration = Duration::from_secs(30);
/// For one card, and for the answer to it.
const TALK: Duration = Duration::from_secs(5);
/// Between two calls.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two looks at the door.
const LOOK: Duration = Duration::from_millis(5);
/// Callers that have not shown a card yet; further ones are turned away.
const MOST_TALKS: usize = 64;

const MAGIC: [u8; 8] = *b"DSRANKS\n";
const PROTOCOL: u32 = 1;

/// The port of `draftsmith`'s ranks, where `MASTER_PORT` is somebody else's.
const OWN_PORT: &str = "DRAFTSMITH_RANKS_PORT";

/// Where ranks meet, as their environment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    host: String,
    port: String,
    /// Of [`OWN_PORT`].
    own_port: Option<String>,
    /// `torchrun` itself listens at the port.
    taken: bool,
    /// Names the launch, where it has a name: ranks of another one are refused.
    job: String,
}

impl Place {
    /// `None` if nobody says.
    pub(super) fn of(variable: impl Fn(&str) -> Option<String>) -> Option<Place> {
        let said = |name| variable(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let job = [said("TORCHELASTIC_RUN_ID"), said("TORCHELASTIC_RESTART_COUNT")];
        Some(Place {
            host: said("MASTER_ADDR")?,
            port: said("MASTER_PORT")?,
            own_port: said(OWN_PORT),
            taken: said("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True"),
            job: job.into_iter().flatten().collect::<Vec<_>>().join(" "),
        })
    }

    /// A place on this machine.
    #[cfg(test)]
    pub(super) fn here(port: u16) -> Place {
        let (host, port) = ("127.0.0.1".to_string(), port.to_string());
        Place { host, port, own_port: None, taken: false, job: String::new() }
    }

    fn port(&self) -> Result<u16, Error> {
        let number = |name: &str, text: &str| {
            text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| {
                Error::input(
                    format!("`{name}` is `{text}`, which is no port"),
                    "give a number from 1 to 65535",
                )
            })
        };
        match &self.own_port {
            Some(own) => number(OWN_PORT, own),
            None => {
                let port = number("MASTER_PORT", &self.port)?;
                port.checked_add(u16::from(self.taken)).ok_or_else(|| {
                    Error::input(
                        "`torchrun` listens at the last port, and draftsmith's ranks meet at the one behind it",
                        format!("set `{OWN_PORT}` to a free port on the machine of rank 0, the same for all ranks"),
                    )
                })
            }
        }
    }

    fn resolve(&self, port: u16) -> io::Result<Vec<SocketAddr>> {
        (self.host.trim_matches(['[', ']']), port).to_socket_addrs().map(Iterator::collect)
    }

    /// Whether its name says that all ranks are on one machine.
    fn is_local(&self) -> bool {
        self.host == "localhost"
            || self.host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// Where rank 0 listens: at the addresses that the place's name has. A name that leads to the loopback of its own machine, as
    /// some systems' hosts files have it, says nothing of the way that others take.
    fn listen(&self, port: u16) -> Result<TcpListener, Error> {
        let failed = |e: &io::Error| match e.kind() {
            io::ErrorKind::AddrInUse => Error::input(
                format!("rank 0 cannot listen at {}:{port}: {e}", self.host),
                format!(
                    "set `MASTER_PORT` or `{OWN_PORT}` to a port that is free there, the same for all ranks"
                ),
            ),
            _ => Error::input(
                format!("rank 0 cannot listen at {}:{port}: {e}", self.host),
                "set `MASTER_ADDR` to an address of the machine that rank 0 runs on, the same for all ranks",
            ),
        };
        let mut all = self.resolve(port).map_err(|e| failed(&e))?;
        if !self.is_local() {
            all.retain(|address| !address.ip().is_loopback());
            if all.is_empty() {
                all.push(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
            }
        }
        let mut why = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in all {
            match TcpListener::bind(address) {
                Ok(listener) => return Ok(listener),
                Err(e) => why = e,
            }
        }
        Err(failed(&why))
    }
}

/// What a card is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    /// A call: this will be the connection for what is said beside the work.
    Side = 1,
    /// A call: this will be the one for the work.
    Work,
    /// The answer to a call that is expected.
    Welcome,
    /// Refusals.
    OtherProtocol,
    OtherJob,
    OtherVersion,
    OtherCount,
    NoSuchRank,
    Taken,
}

const WORDS: [Word; 9] = [
    Word::Side,
    Word::Work,
    Word::Welcome,
    Word::OtherProtocol,
    Word::OtherJob,
    Word::OtherVersion,
    Word::OtherCount,
    Word::NoSuchRank,
    Word::Taken,
];

/// A text in a fixed number of bytes.
fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

/// Such a text as others may have written it.
fn text_of(bytes: &[u8]) -> String {
    let bytes = bytes.iter().take_while(|b| **b != 0);
    bytes.map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '?' }).collect()
}

/// What a process says of itself to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Card {
    word: Word,
    rank: u32,
    ranks: u32,
    process: u32,
    /// Where it listens itself; 0: nowhere.
    port: u16,
    /// Tells processes apart that have the same rank.
    nonce: u64,
    version: [u8; 32],
    job: [u8; 64],
    host: [u8; 64],
}

const HEAD: usize = MAGIC.len() + 4;
const BODY: usize = 1 + 4 * 3 + 2 + 8 + 32 + 64 + 64;

impl Card {
    fn mine(place: &Place, rank: usize, ranks: usize) -> Card {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Card {
            word: Word::Side,
            rank: rank as u32,
            ranks: ranks as u32,
            process: std::process::id(),
            port: 0,
            nonce: since.as_nanos() as u64 ^ u64::from(std::process::id()) << 40 ^ (rank as u64) << 32,
            version: fixed(env!("CARGO_PKG_VERSION")),
            job: fixed(&place.job),
            host: fixed(&host()),
        }
    }

    fn with(&self, word: Word) -> Card {
        Card { word, ..*self }
    }

    fn to_bytes(self) -> [u8; HEAD + BODY] {
        let mut bytes = Vec::with_capacity(HEAD + BODY);
        bytes.extend(MAGIC);
        bytes.extend(PROTOCOL.to_le_bytes());
        bytes.push(self.word as u8);
        for number in [self.rank, self.ranks, self.process] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.port.to_le_bytes());
        bytes.extend(self.nonce.to_le_bytes());
        bytes.extend(self.version);
        bytes.extend(self.job);
        bytes.extend(self.host);
        bytes.try_into().expect("fields have these sizes")
    }

    /// `None`: no word that is known.
    fn of_body(body: &[u8; BODY]) -> Option<Card> {
        let mut rest = body.as_slice();
        fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
            let (taken, more) = rest.split_first_chunk::<N>()?;
            *rest = more;
            Some(*taken)
        }
        let rest = &mut rest;
        let [word] = take(rest)?;
        Some(Card {
            word: *WORDS.iter().find(|known| **known as u8 == word)?,
            rank: u32::from_le_bytes(take(rest)?),
            ranks: u32::from_le_bytes(take(rest)?),
            process: u32::from_le_bytes(take(rest)?),
            port: u16::from_le_bytes(take(rest)?),
            nonce: u64::from_le_bytes(take(rest)?),
            version: take(rest)?,
            job: take(rest)?,
            host: take(rest)?,
        })
    }

    /// As errors call it.
    fn name(&self) -> String {
        format!("rank {} of {} ({}, process {})", self.rank, self.ranks, text_of(&self.host), self.process)
    }
}

/// The name of this machine; its address has to do where it has none.
pub(super) fn host() -> String {
    #[cfg(unix)]
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    let name = String::new();
    if name.is_empty() { "unknown host".to_string() } else { name }
}

/// Fills a buffer before a moment, whatever the pace of the other side.
fn read_until(mut stream: &TcpStream, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => buffer = &mut buffer[n..],
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What came in place of a card.
enum NoCard {
    /// Nothing, or something else.
    Stranger,
    /// The card of another protocol.
    OtherProtocol(u32),
}

fn read_card(stream: &TcpStream) -> Result<Card, NoCard> {
    let until = Instant::now() + TALK;
    let mut head = [0; HEAD];
    read_until(stream, &mut head, until).map_err(|_| NoCard::Stranger)?;
    let Some(protocol) = head.strip_prefix(&MAGIC) else { return Err(NoCard::Stranger) };
    let protocol = u32::from_le_bytes(protocol.try_into().expect("four bytes"));
    if protocol != PROTOCOL {
        return Err(NoCard::OtherProtocol(protocol));
    }
    let mut body = [0; BODY];
    read_until(stream, &mut body, until).map_err(|_| NoCard::Stranger)?;
    Card::of_body(&body).ok_or(NoCard::Stranger)
}

fn write_all(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.set_write_timeout(Some(TALK))?;
    stream.write_all(bytes)
}

/// True if the other side is gone.
fn is_gone(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let back = stream.set_nonblocking(false);
    back.is_err()
        || match peeked {
            Ok(n) => n == 0,
            Err(e) => e.kind() != io::ErrorKind::WouldBlock,
        }
}

/// A caller that has shown its card.
struct Guest {
    stream: TcpStream,
    from: SocketAddr,
    card: Result<Card, u32>,
}

/// Where callers come in.
struct Door {
    listener: TcpListener,
    guests: (Sender<Guest>, Receiver<Guest>),
    talks: Arc<AtomicUsize>,
}

impl Door {
    fn new(listener: TcpListener) -> io::Result<Door> {
        listener.set_nonblocking(true)?;
        Ok(Door { listener, guests: channel(), talks: Arc::default() })
    }

    /// The next one, if one comes soon. Each shows its card in its own time: one that says nothing holds nobody up.
    fn next(&self) -> Option<Guest> {
        while let Ok((stream, from)) = self.listener.accept() {
            if self.talks.fetch_add(1, Ordering::Relaxed) >= MOST_TALKS
                || stream.set_nonblocking(false).is_err()
            {
                self.talks.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (tell, talks) = (self.guests.0.clone(), Arc::clone(&self.talks));
            std::thread::spawn(move || {
                let card = match read_card(&stream) {
                    Ok(card) => Some(Ok(card)),
                    Err(NoCard::OtherProtocol(protocol)) => Some(Err(protocol)),
                    Err(NoCard::Stranger) => None,
                };
                talks.fetch_sub(1, Ordering::Relaxed);
                if let Some(card) = card {
                    let _ = tell.send(Guest { stream, from, card });
                }
            });
        }
        self.guests.1.recv_timeout(LOOK).ok()
    }
}

/// A rank that has come.
struct Seat {
    card: Card,
    from: SocketAddr,
    side: TcpStream,
    work: Option<TcpStream>,
}

/// The ranks that are to call this one, and those that have.
struct Seats {
    mine: Card,
    /// By rank.
    seats: Vec<Option<Seat>>,
    /// Who was refused, and why.
    refused: Vec<String>,
}

impl Seats {
    fn new(mine: Card) -> Seats {
        Seats { mine, seats: (0..mine.ranks).map(|_| None).collect(), refused: Vec::new() }
    }

    /// Ranks that have not come whole.
    fn missing(&self) -> Vec<usize> {
        let has_come = |seat: &Option<Seat>| seat.as_ref().is_some_and(|seat| seat.work.is_some());
        let callers = self.mine.rank as usize + 1..self.seats.len();
        callers.filter(|rank| !has_come(&self.seats[*rank])).collect()
    }

    fn judge(&self, guest: &Card) -> Word {
        let mine = &self.mine;
        match guest {
            g if g.job != mine.job => Word::OtherJob,
            g if g.version != mine.version => Word::OtherVersion,
            g if g.ranks != mine.ranks => Word::OtherCount,
            g if g.rank <= mine.rank || g.rank >= mine.ranks => Word::NoSuchRank,
            g => match (&self.seats[g.rank as usize], g.word) {
                (None, Word::Side) => Word::Welcome,
                // It calls again, or another came in place of one that has ended.
                (Some(seat), Word::Side) if seat.card.nonce == g.nonce || is_gone(&seat.side) => {
                    Word::Welcome
                }
                (Some(seat), Word::Work) if seat.card.nonce == g.nonce => Word::Welcome,
                _ => Word::Taken,
            },
        }
    }

    fn take(&mut self, Guest { stream, from, card }: Guest) {
        let answer = |word| write_all(&stream, &self.mine.with(word).to_bytes()).is_ok();
        let card = match card {
            Ok(card) => card,
            Err(protocol) => {
                answer(Word::OtherProtocol);
                self.refused.push(format!("a program of another version ({from}, protocol {protocol})"));
                return;
            }
        };
        let word = self.judge(&card);
        let answered = answer(word);
        match word {
            Word::Welcome if !answered || stream.set_nodelay(true).is_err() => {}
            Word::Welcome if card.word == Word::Work => {
                if let Some(seat) = &mut self.seats[card.rank as usize] {
                    seat.work = Some(stream);
                }
            }
            Word::Welcome => {
                self.seats[card.rank as usize] = Some(Seat { card, from, side: stream, work: None });
            }
            word => self.refused.push(format!(
                "{} from {from}: {}",
                card.name(),
                refusal(word, &card, &self.mine)
            )),
        }
    }

    /// Waits until all have come.
    ///
    /// # Errors
    /// Those that have not.
    fn fill(&mut self, door: &Door, until: Instant) -> Result<(), Vec<usize>> {
        loop {
            let missing = self.missing();
            match (missing.is_empty(), Instant::now() < until) {
                (true, _) => return Ok(()),
                (false, true) => {
                    if let Some(guest) = door.next() {
                        self.take(guest);
                    }
                }
                (false, false) => return Err(missing),
            }
        }
    }
}

/// Why a caller is refused.
fn refusal(word: Word, caller: &Card, called: &Card) -> String {
    match word {
        Word::OtherProtocol => "the programs are of different versions".to_string(),
        Word::OtherJob => "it belongs to another launch".to_string(),
        Word::OtherVersion => format!(
            "it is draftsmith {}, rank {} is draftsmith {}",
            text_of(&caller.version),
            called.rank,
            text_of(&called.version)
        ),
        Word::OtherCount => {
            format!("it is one of {} ranks, rank {} is one of {}", caller.ranks, called.rank, called.ranks)
        }
        Word::NoSuchRank => format!("rank {} does not wait for it", called.rank),
        Word::Taken => "another process has come as this rank".to_string(),
        Word::Side | Word::Work | Word::Welcome => "it is answered by a word that is no answer".to_string(),
    }
}

/// Why one call did not do.
enum Failed {
    /// It may be too early.
    Yet(String),
    /// It will never do.
    Ever(Error),
}

/// Calls until it is answered.
fn until_answered<T>(
    until: Instant,
    mut call: impl FnMut() -> Result<T, Failed>,
    in_vain: impl FnOnce(&str) -> Error,
) -> Result<T, Error> {
    loop {
        match call() {
            Ok(answered) => return Ok(answered),
            Err(Failed::Ever(error)) => return Err(error),
            Err(Failed::Yet(why)) if Instant::now() + AGAIN >= until => return Err(in_vain(&why)),
            Err(Failed::Yet(_)) => std::thread::sleep(AGAIN),
        }
    }
}

/// Connects to the first of some addresses that takes it.
fn connect(addresses: io::Result<Vec<SocketAddr>>) -> Result<TcpStream, Failed> {
    let mut why = "its name has no address".to_string();
    for address in addresses.map_err(|e| Failed::Yet(e.to_string()))? {
        match TcpStream::connect_timeout(&address, TALK) {
            // A system may connect a port of its own choice with itself, where nobody listens.
            Ok(stream) if stream.local_addr().ok() == stream.peer_addr().ok() => {
                why = format!("{address}: nobody listens");
            }
            Ok(stream) => return Ok(stream),
            Err(e) => why = format!("{address}: {e}"),
        }
    }
    Err(Failed::Yet(why))
}

/// Shows a card, and reads what is answered.
fn show(stream: &TcpStream, card: &Card) -> Result<Card, Failed> {
    let yet = |e: io::Error| Failed::Yet(e.to_string());
    stream.set_nodelay(true).map_err(yet)?;
    write_all(stream, &card.to_bytes()).map_err(yet)?;
    let ever = |word, called: &Card| {
        Failed::Ever(Error::input(
            format!("{} is refused: {}", card.name(), refusal(word, card, called)),
            "start every rank once, with the same program and `WORLD_SIZE`, and with a `RANK` of its own from 0 on",
        ))
    };
    match read_card(stream) {
        Ok(called) => match called.word {
            Word::Welcome => Ok(called),
            Word::OtherJob => Err(Failed::Yet("another launch of draftsmith listens there".to_string())),
            word => Err(ever(word, &called)),
        },
        Err(NoCard::OtherProtocol(_)) => Err(ever(Word::OtherProtocol, card)),
        Err(NoCard::Stranger) => Err(Failed::Yet("what listens there is not draftsmith".to_string())),
    }
}

/// The connections to another rank.
pub(super) struct Pair {
    /// What is said beside the work.
    pub(super) side: TcpStream,
    /// Messages of the work.
    pub(super) work: TcpStream,
    /// As errors call the other rank.
    pub(super) name: String,
}

/// Why a rank did not come to the others.
pub(super) enum Missed {
    /// It says so itself.
    Mine(Error),
    /// Rank 0 does.
    Told,
}

impl From<Error> for Missed {
    fn from(error: Error) -> Missed {
        Missed::Mine(error)
    }
}

/// What rank 0 tells of a rank: where it listens. `None`: on the machine of rank 0.
type Whereabouts = (Option<IpAddr>, u16);

const WHEREABOUTS: usize = 1 + 16 + 2;
/// Before them: all have come; some have not.
const ALL: u8 = 1;
const SOME: u8 = 0;

fn to_bytes((ip, port): Whereabouts) -> [u8; WHEREABOUTS] {
    let mut bytes = [0; WHEREABOUTS];
    match ip {
        None => {}
        Some(IpAddr::V4(ip)) => {
            bytes[0] = 4;
            bytes[1..5].copy_from_slice(&ip.octets());
        }
        Some(IpAddr::V6(ip)) => {
            bytes[0] = 6;
            bytes[1..17].copy_from_slice(&ip.octets());
        }
    }
    bytes[17..].copy_from_slice(&port.to_le_bytes());
    bytes
}

fn whereabouts(bytes: &[u8]) -> Option<Whereabouts> {
    let (kind, rest) = bytes.split_first()?;
    let (ip, rest) = rest.split_first_chunk::<16>()?;
    let port = u16::from_le_bytes(rest.try_into().ok()?);
    let ip = match kind {
        0 => None,
        4 => Some(IpAddr::V4(Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3]))),
        6 => Some(IpAddr::V6(Ipv6Addr::from(*ip))),
        _ => return None,
    };
    Some((ip, port))
}

/// Connects this rank with all others; gives what connects it to each, by rank.
///
/// # Errors
/// Ranks that do not come, and what stands in the way of this one.
pub(super) fn meet(
    place: &Place,
    (rank, ranks): (usize, usize),
    patience: Duration,
) -> Result<Vec<Option<Pair>>, Missed> {
    let mine = Card::mine(place, rank, ranks);
    let port = place.port()?;
    match rank {
        0 => first(place, port, mine, patience),
        _ => other(place, port, mine, patience),
    }
}

fn broken(what: &str, e: impl std::fmt::Display) -> Error {
    Error::input(format!("{what}: {e}"), "look whether the hosts of the ranks reach each other, at any port")
}

fn counted(ranks: &[usize]) -> String {
    match ranks {
        [one] => format!("rank {one}"),
        many => format!("ranks {}", many.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
    }
}

fn first(place: &Place, port: u16, mine: Card, patience: Duration) -> Result<Vec<Option<Pair>>, Missed> {
    let listener = place.listen(port)?;
    let door = Door::new(listener).map_err(|e| broken("rank 0 cannot listen", e))?;
    let mut seats = Seats::new(mine);
    let came = seats.fill(&door, Instant::now() + patience);
    let told = match &came {
        Err(_) => vec![SOME],
        Ok(()) => {
            let mut told = vec![ALL];
            for seat in seats.seats.iter().flatten() {
                let ip = Some(seat.from.ip()).filter(|ip| !ip.is_loopback());
                told.extend(to_bytes((ip, seat.card.port)));
            }
            told
        }
    };
    for seat in seats.seats.iter().flatten() {
        // Whoever is gone meanwhile is missed as soon as there is a link.
        let _ = write_all(&seat.side, &told);
    }
    if let Err(missing) = came {
        let refused = match seats.refused.as_slice() {
            [] => String::new(),
            refused => format!("; refused: {}", refused.join("; ")),
        };
        return Err(Missed::Mine(Error::input(
            format!(
                "rank 0 waited {} s at {}:{port} for {} of {}, in vain{refused}",
                patience.as_secs(),
                place.host,
                counted(&missing),
                mine.ranks
            ),
            "start all ranks with the same `MASTER_ADDR`, `MASTER_PORT` and `WORLD_SIZE`, and look whether their hosts reach \
             each other",
        )));
    }
    Ok(seats.seats.into_iter().map(|seat| seat.and_then(pair)).collect())
}

fn pair(seat: Seat) -> Option<Pair> {
    Some(Pair { name: seat.card.name(), side: seat.side, work: seat.work? })
}

/// Both connections to a rank that listens; the second is the same caller's as the first.
fn call(
    addresses: io::Result<Vec<SocketAddr>>,
    card: impl FnOnce(&TcpStream) -> io::Result<Card>,
) -> Result<Pair, Failed> {
    let yet = |e: io::Error| Failed::Yet(e.to_string());
    let side = connect(addresses)?;
    let card = card(&side).map_err(yet)?;
    let called = show(&side, &card)?;
    let work = connect(side.peer_addr().map(|address| vec![address]))?;
    show(&work, &card.with(Word::Work))?;
    Ok(Pair { name: called.name(), side, work })
}

fn other(place: &Place, port: u16, mut mine: Card, patience: Duration) -> Result<Vec<Option<Pair>>, Missed> {
    let (rank, ranks) = (mine.rank as usize, mine.ranks as usize);
    let me = format!("rank {rank} of {ranks}");
    // Ranks above this one call it. It listens where it is seen from rank 0.
    let mut listener = None;
    let listen = |side: &TcpStream| -> io::Result<Option<TcpListener>> {
        if rank + 1 == ranks {
            return Ok(None);
        }
        let ip = match side.local_addr()?.ip() {
            IpAddr::V4(ip) if ip.is_loopback() && !place.is_local() => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(ip) if ip.is_loopback() && !place.is_local() => Ipv6Addr::UNSPECIFIED.into(),
            ip => ip,
        };
        TcpListener::bind((ip, 0)).map(Some)
    };
    let to_first = until_answered(
        Instant::now() + patience,
        || {
            call(place.resolve(port), |side| {
                listener = listen(side)?;
                mine.port = match &listener {
                    Some(listener) => listener.local_addr()?.port(),
                    None => 0,
                };
                Ok(mine)
            })
        },
        |why| {
            Error::input(
                format!(
                    "{me} found no rank 0 at {}:{port} within {} s: {why}",
                    place.host,
                    patience.as_secs()
                ),
                "start rank 0 with the same `MASTER_ADDR` and `MASTER_PORT`, and look whether this host reaches it",
            )
        },
    )?;
    let mut told = [0; 1];
    let until = Instant::now() + patience + MARGIN;
    let lost =
        |e| broken(&format!("{me} lost rank 0 at {}:{port} before all ranks were there", place.host), e);
    read_until(&to_first.side, &mut told, until).map_err(lost)?;
    if told == [SOME] {
        return Err(Missed::Told);
    }
    let mut told = vec![0; WHEREABOUTS * (ranks - 1)];
    read_until(&to_first.side, &mut told, until).map_err(lost)?;
    let at_first = to_first.side.peer_addr().map_err(lost)?.ip();
    let mut pairs: Vec<Option<Pair>> = (0..ranks).map(|_| None).collect();
    let until = Instant::now() + TOGETHER;
    for (number, bytes) in told.chunks_exact(WHEREABOUTS).enumerate().take(rank - 1) {
        let number = number + 1;
        let Some((ip, port)) = whereabouts(bytes) else {
            return Err(Missed::Mine(broken(&me, "rank 0 says what nobody knows of the others")));
        };
        let address = SocketAddr::from((ip.unwrap_or(at_first), port));
        pairs[number] = Some(until_answered(
            until,
            || call(Ok(vec![address]), |_| Ok(mine)),
            |why| broken(&format!("{me} does not reach rank {number} at {address}"), why),
        )?);
    }
    pairs[0] = Some(to_first);
    if let Some(listener) = listener {
        let door = Door::new(listener).map_err(|e| broken(&format!("{me} cannot listen"), e))?;
        let mut seats = Seats::new(mine);
        seats.fill(&door, until).map_err(|missing| {
            broken(
                &format!("{me} waited {} s for {}, in vain", TOGETHER.as_secs(), counted(&missing)),
                "nobody called",
            )
        })?;
        for (pair_of, seat) in pairs.iter_mut().zip(seats.seats) {
            if let Some(seat) = seat {
                *pair_of = pair(seat);
            }
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Option<Place> {
        Place::of(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_string()))
    }

    #[test]
    fn the_port_is_the_one_behind_that_of_torchrun_itself() {
        let hand = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
        assert_eq!(place(&hand).unwrap().port().unwrap(), 29500);
        assert_eq!(place(&hand[..1]), None);
        let agent =
            [hand[0], hand[1], ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RUN_ID", "a")];
        assert_eq!(place(&agent).unwrap().port().unwrap(), 29501);
        let none = [hand[0], hand[1], ("TORCHELASTIC_USE_AGENT_STORE", "False")];
        assert_eq!(place(&none).unwrap().port().unwrap(), 29500);
        let own = [agent[0], agent[1], agent[2], (OWN_PORT, "777")];
        assert_eq!(place(&own).unwrap().port().unwrap(), 777);
        let last = [hand[0], ("MASTER_PORT", "65535"), agent[2]];
        assert!(place(&last).unwrap().port().unwrap_err().hint().unwrap().contains(OWN_PORT));
        for bad in ["0", "70000", "x", "-1"] {
            let error = place(&[hand[0], ("MASTER_PORT", bad)]).unwrap().port().unwrap_err();
            assert_eq!(error.to_string(), format!("`MASTER_PORT` is `{bad}`, which is no port"));
        }
    }

    #[test]
    fn cards_and_whereabouts_come_back_and_others_do_not() {
        let card = Card { port: 4711, ..Card::mine(&Place::here(1), 3, 5) };
        let bytes = card.to_bytes();
        let body: &[u8; BODY] = bytes[HEAD..].try_into().unwrap();
        assert_eq!(Card::of_body(body), Some(card));
        assert!(card.name().starts_with("rank 3 of 5 ("), "{}", card.name());
        for word in [0, WORDS.len() as u8 + 1, 255] {
            let mut body = *body;
            body[0] = word;
            assert_eq!(Card::of_body(&body), None);
        }
        let mut foreign = card;
        foreign.host[..3].copy_from_slice(b"\x1b\n\xff");
        assert!(foreign.name().contains("???"), "{}", foreign.name());
        for at in [None, Some("10.1.2.3".parse().unwrap()), Some("fd00::7".parse().unwrap())] {
            assert_eq!(whereabouts(&to_bytes((at, 4711))), Some((at, 4711)));
        }
        assert_eq!(whereabouts(&[9; WHEREABOUTS]), None);
        assert_eq!(whereabouts(&[4; WHEREABOUTS - 1]), None);
    }
}
