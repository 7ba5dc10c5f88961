//! OpenAI-compatible HTTP over the decode engine, with speculation that can be watched.
//!
//! One thread owns the batch of a model; requests reach it through a queue that is fair between clients, and what
//! it commits goes back through a channel per request that never blocks it. A reader that leaves ends its sequence.
//!
//! Invariant: neither the draft, nor the load, nor a change of the draft changes the text of an answer.
//!
//! Nothing here prints or reads the environment; lines for people go to [`Log`].

mod api;
mod auth;
mod board;
mod cors;
mod fleet;
mod generations;
mod grammar;
mod http;
mod metrics;
mod page;
mod queue;
mod speech;
mod swap;
mod tools;
mod worker;

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use draftsmith_core::VerifyRule;
use draftsmith_decode::{DraftPlan, Engine};
use draftsmith_kernels::Kernels;
use draftsmith_text::{ChatTemplate, Tokenizer};

use crate::api::ApiError;
use crate::board::Board;
use crate::fleet::{Fleet, Lease, Wish};
use crate::generations::Generations;
use crate::grammar::{GrammarError, Grammars};
use crate::metrics::Metrics;
use crate::queue::{Order, Queue};
use crate::swap::{Candidates, CandidatesOn, InUse};
use crate::tools::{Ability, Family, Unable};
use crate::worker::{Room, Shared, Worker};

pub use auth::ApiKey;
pub use cors::Origin;
pub use fleet::Models;
pub use swap::{DraftInfo, Drafts, Loaded, Refused};

/// Takes one line for the log.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// Takes what is known of a request that asked for an answer, once it ended: `time` (seconds since 1970), `id`, `key` (the
/// name of the API key, or the address), `route`, `status`, `model`, `stream`, `prompt_tokens`, `cached_tokens`,
/// `completion_tokens`, `queue_ms`, `first_token_ms`, `total_ms`, `accept_length`, `finish_reasons`, `reader_left`, `error`.
pub type RequestLog = Arc<dyn Fn(&serde_json::Value) + Send + Sync>;

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened at.
    #[error("`{address}` cannot be listened at: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system gives no threads.
    #[error("the server's threads cannot be started: {source}")]
    Threads {
        /// What the system said.
        source: std::io::Error,
    },
}

impl ServeError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            ServeError::Bind { source, .. } => Some(
                match source.kind() {
                    std::io::ErrorKind::AddrInUse => {
                        "another program listens there: choose another `--port`, or 0 for a free one"
                    }
                    std::io::ErrorKind::PermissionDenied => {
                        "ports below 1024 are the system's: choose a higher `--port`"
                    }
                    _ => "choose another `--port`, or an address of this machine as `--host`",
                }
                .into(),
            ),
            ServeError::Threads { .. } => None,
        }
    }
}

/// Bounds of what the server takes on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences decoded side by side.
    pub sequences: usize,
    /// Sequences that wait.
    pub queue: usize,
    /// Open connections; further ones wait to be accepted.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// From the arrival of a request to the end of its answer.
    pub request_time: Duration,
    /// From the wish to end to the end.
    pub drain_time: Duration,
    /// Tokens of an answer when the request does not say.
    pub default_max_tokens: usize,
    /// Verify steps after which a new draft is judged.
    pub watch_steps: u64,
}

/// Runs of training that are shown beside the model, going on or done.
pub trait Runs: Send + Sync {
    /// One object per run, with its `name`.
    fn list(&self) -> Vec<serde_json::Value>;
    /// A run of the list, with its stages and the curves of its training; `None` where the list has no such name.
    fn run(&self, name: &str) -> Option<serde_json::Value>;
}

/// What the server is told before a model is there.
pub struct Options {
    /// Where to listen: the first of these that can be listened at.
    pub addresses: Vec<SocketAddr>,
    /// Keys, one of which each request must bring; none: everybody may ask.
    pub api_keys: Vec<ApiKey>,
    /// Key of `/admin`; without it only this machine may.
    pub admin_key: Option<ApiKey>,
    /// Origins whose pages may read answers in a browser, besides our own page.
    pub allow_origins: Vec<Origin>,
    /// Bounds.
    pub limits: Limits,
    /// Folder of bench records to show beside the bundle's.
    pub records: Option<PathBuf>,
    /// Runs to show.
    pub runs: Option<Arc<dyn Runs>>,
    /// Answers that are kept, token by token, for the clients that asked for them; 0: none.
    pub keep_generations: usize,
    /// Which draft tokens of sampled answers are kept, unless a request says.
    pub verify: VerifyRule,
    /// How much to draft, unless a request says; `None`: as the draft was tuned, and without that as much as pays.
    pub plan: Option<DraftPlan>,
    /// How the model writes calls of tools, where its template does not tell: one of [`tool_formats`].
    pub tool_format: Option<String>,
    /// Takes lines for people.
    pub log: Log,
    /// Takes a record of each request.
    pub request_log: Option<RequestLog>,
}

/// The names of the forms in which models write calls of tools.
pub fn tool_formats() -> impl Iterator<Item = &'static str> {
    tools::FAMILIES.iter().map(|family| family.name)
}

/// A model to serve.
pub struct Model<K: Kernels> {
    /// The name that requests use.
    pub name: String,
    /// Hash of the target's weights.
    pub sha256: String,
    /// Target and draft, with costs.
    pub engine: Engine<K>,
    /// The draft that the engine has.
    pub draft: Option<DraftInfo>,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text; `None` for a base model.
    pub template: Option<ChatTemplate>,
    /// Cache slots (tokens) over all sequences.
    pub cache_slots: usize,
    /// Where other drafts come from.
    pub drafts: Arc<dyn Drafts<K>>,
}

/// A model on whichever kernels, on its way to its thread.
pub(crate) trait Employ: Send {
    /// Gives it a thread that decodes for it.
    fn employ(self: Box<Self>, app: &App, metrics: Arc<Metrics>) -> Result<Employed, ServeError>;
}

impl<K: Kernels> Employ for Model<K> {
    fn employ(self: Box<Self>, app: &App, metrics: Arc<Metrics>) -> Result<Employed, ServeError> {
        app.employ(*self, metrics)
    }
}

/// A model in service and its thread.
type Employed = (Service, std::thread::JoinHandle<()>);

/// The model in service, as handlers see it.
struct Service {
    name: String,
    /// Changes with the target and this program, not with the draft: it names what the text depends on.
    fingerprint: String,
    tokenizer: Arc<Tokenizer>,
    grammars: Result<Grammars, GrammarError>,
    template: Option<ChatTemplate>,
    /// What the model can do with tools.
    tools: Result<Ability, Unable>,
    context: usize,
    vocab: usize,
    verify: VerifyRule,
    default_plan: Option<DraftPlan>,
    cache_slots: usize,
    created_unix_s: u64,
    queue: Arc<Queue>,
    metrics: Arc<Metrics>,
    board: Arc<Board>,
    candidates: Box<dyn Candidates>,
}

/// What is served.
enum Served {
    /// One model, from the start to the end.
    One(Arc<Service>),
    /// Several, loaded when they are asked for.
    Fleet(Arc<Fleet>),
}

/// State of the server.
struct App {
    options: Options,
    served: OnceLock<Served>,
    generations: Arc<Generations>,
    draining: AtomicBool,
    /// A change of the draft is under way.
    swapping: AtomicBool,
    next_id: AtomicU64,
    /// Makes ids differ from those of another start.
    start: u64,
    began_unix_s: f64,
}

impl App {
    fn served(&self) -> Result<&Served, ApiError> {
        self.served.get().ok_or_else(ApiError::loading)
    }

    /// The model; of several, the one that was used last.
    fn service(&self) -> Result<Lease, ApiError> {
        match self.served()? {
            Served::One(service) => Ok(Lease::lasting(service)),
            Served::Fleet(fleet) => fleet.latest().ok_or_else(|| ApiError::asleep(&fleet.first())),
        }
    }

    /// Several models, if there are several.
    fn fleet(&self) -> Option<&Arc<Fleet>> {
        match self.served.get()? {
            Served::Fleet(fleet) => Some(fleet),
            Served::One(_) => None,
        }
    }

    /// The model that a request names; of several it is loaded if it must be. Whether the name is right where there is
    /// one model is looked at later.
    async fn lease(self: &Arc<App>, name: Option<&str>, arrived: Instant) -> Result<Lease, ApiError> {
        match self.served()? {
            Served::One(service) => Ok(Lease::lasting(service)),
            Served::Fleet(fleet) => match name {
                Some(name) => fleet.lease(self, name, arrived).await,
                None => Err(ApiError::which_model()),
            },
        }
    }

    /// What counts requests of a model, or those that name none of ours; `None` before there is a model.
    fn metrics(&self, name: Option<&str>) -> Option<Arc<Metrics>> {
        Some(match self.served.get()? {
            Served::One(service) => Arc::clone(&service.metrics),
            Served::Fleet(fleet) => fleet.metrics_of(name),
        })
    }

    /// Gives a model a thread that decodes for it.
    fn employ<K: Kernels>(&self, model: Model<K>, metrics: Arc<Metrics>) -> Result<Employed, ServeError> {
        let limits = self.options.limits;
        let queue = Arc::new(Queue::new(limits.queue));
        let board = Arc::new(Board::new(model.draft.clone()));
        let tokenizer = model.tokenizer;
        let config = model.engine.target().config();
        let (context, vocab) = (config.max_position, config.vocab_size);
        let shared = Shared {
            tokenizer: Arc::clone(&tokenizer),
            queue: Arc::clone(&queue),
            metrics: Arc::clone(&metrics),
            board: Arc::clone(&board),
            log: Arc::clone(&self.options.log),
        };
        let room =
            Room { slots: model.cache_slots, sequences: limits.sequences, watch_steps: limits.watch_steps };
        let target = Arc::new(Engine::new(Arc::clone(model.engine.target()), None));
        let format = self.options.tool_format.as_deref().and_then(Family::named);
        let ability = Ability::of(model.template.as_ref(), &tokenizer, format);
        let (to_worker, replacements) = channel();
        let candidates = CandidatesOn { drafts: model.drafts, target, to_worker, queue: Arc::clone(&queue) };
        let in_use = InUse { engine: Arc::new(model.engine), info: model.draft };
        let service = Service {
            fingerprint: format!(
                "draftsmith-{}-{}",
                env!("CARGO_PKG_VERSION"),
                model.sha256.get(..8).unwrap_or(&model.sha256)
            ),
            name: model.name,
            grammars: Grammars::new(&tokenizer),
            tokenizer,
            template: model.template,
            tools: ability,
            context,
            vocab,
            verify: self.options.verify,
            default_plan: self.options.plan,
            cache_slots: model.cache_slots,
            created_unix_s: unix_s(),
            queue,
            metrics,
            board,
            candidates: Box::new(candidates),
        };
        // A batch stays on the thread that made it.
        let work = move || Worker::new(in_use, replacements, room, shared).run();
        let thread = std::thread::Builder::new().name("decode".into()).spawn(work);
        Ok((service, thread.map_err(|source| ServeError::Threads { source })?))
    }
}

fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A number that nobody can foresee, from the keys of the standard library's hash tables.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// Listens at the first address where that is possible.
async fn listen(addresses: &[SocketAddr]) -> Result<tokio::net::TcpListener, ServeError> {
    let mut first = None;
    for address in addresses {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source) => first = first.or(Some(ServeError::Bind { address: *address, source })),
        }
    }
    let nowhere = || SocketAddr::from(([0, 0, 0, 0], 0));
    let none =
        || ServeError::Bind { address: nowhere(), source: std::io::ErrorKind::AddrNotAvailable.into() };
    Err(first.unwrap_or_else(none))
}

/// A server that listens. Until [`Server::open`] it answers that the model is being loaded.
pub struct Server {
    app: Arc<App>,
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
    http: http::Http,
    worker: Option<std::thread::JoinHandle<()>>,
    /// What several models ask for.
    wishes: Option<Receiver<Wish>>,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start(options: Options) -> Result<Server, ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(4)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(|source| ServeError::Threads { source })?;
        let listener = runtime.block_on(listen(&options.addresses))?;
        let bind = |source| ServeError::Bind { address: options.addresses[0], source };
        let address = listener.local_addr().map_err(bind)?;
        let app = Arc::new(App {
            generations: Arc::new(Generations::new(options.keep_generations)),
            options,
            served: OnceLock::new(),
            draining: AtomicBool::new(false),
            swapping: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            start: random(),
            began_unix_s: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0.0, |time| time.as_secs_f64()),
        });
        let http = http::Http::start(&runtime, listener, Arc::clone(&app));
        Ok(Server { app, runtime, address, http, worker: None, wishes: None })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins to answer with this model. The first call counts.
    ///
    /// # Errors
    /// [`ServeError::Threads`].
    pub fn open<K: Kernels>(&mut self, model: Model<K>) -> Result<(), ServeError> {
        if self.app.served.get().is_some() {
            return Ok(());
        }
        let metrics = Arc::new(Metrics::new(&model.name));
        let (service, worker) = self.app.employ(model, metrics)?;
        // Nobody else opens it.
        let _ = self.app.served.set(Served::One(Arc::new(service)));
        self.worker = Some(worker);
        Ok(())
    }

    /// Begins to answer for several models, which [`Server::attend`] loads when requests name them. `memory`: bytes that
    /// those that are loaded may take together, by estimate. The first call counts.
    pub fn open_fleet(&mut self, names: Vec<String>, memory: u64) {
        let (wishes, wanted) = channel();
        let log = Arc::clone(&self.app.options.log);
        let fleet = Fleet::new(names, memory, wishes, unix_s(), log);
        if self.app.served.set(Served::Fleet(Arc::new(fleet))).is_ok() {
            self.wishes = Some(wanted);
        }
    }

    /// Loads what is asked for, on this thread, for about so long.
    pub fn attend<K: Kernels>(&mut self, models: &mut dyn Models<K>, time: Duration) {
        let until = Instant::now() + time;
        let Some(wishes) = &self.wishes else { return std::thread::sleep(time) };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let wish = match wishes.recv_timeout(left) {
                Ok(wish) => wish,
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => return std::thread::sleep(left),
            };
            // Whoever asked may have left. A panic was told where it happened; it costs those who asked.
            match wish {
                Wish::Bytes(name, reply) => {
                    let _ = reply.send(guarded(|| models.bytes(&name)));
                }
                Wish::Load(name, reply) => {
                    let _ = reply.send(guarded(|| models.load(&name).map(|model| Box::new(model) as _)));
                }
            }
        }
    }

    /// Loads the draft in use anew from its folder, checks it and switches to it, in the background.
    pub fn reload(&self) {
        let app = Arc::clone(&self.app);
        self.runtime.spawn(async move { api::reload(app).await });
    }

    /// Takes no more requests, ends those under way within the drain limit and stops.
    pub fn drain(self) {
        let Server { app, runtime, http, worker, wishes, .. } = self;
        app.draining.store(true, Ordering::SeqCst);
        // Nothing is loaded any more: those who wait for it hear so.
        drop(wishes);
        if let Some(fleet) = app.fleet() {
            fleet.close();
        }
        let limits = app.options.limits;
        runtime.block_on(http.drain(limits.drain_time, || match app.served.get() {
            Some(Served::One(service)) => service.queue.order(Order::CutAll),
            Some(Served::Fleet(fleet)) => fleet.cut_all(),
            None => {}
        }));
        match app.served.get() {
            Some(Served::One(service)) => service.queue.order(Order::Stop),
            Some(Served::Fleet(fleet)) => fleet.stop(),
            None => {}
        }
        if let Some(worker) = worker {
            // A panic of the worker was told where it happened.
            let _ = worker.join();
        }
        runtime.shutdown_background();
    }
}

/// The same, but for a panic, which is told as a fault of ours.
fn guarded<T>(work: impl FnOnce() -> Result<T, Refused>) -> Result<T, Refused> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let message = "draftsmith has a bug, and loading ran into it".to_owned();
        Err(Refused { message, hint: Some("the server's own log says where".to_owned()) })
    })
}
