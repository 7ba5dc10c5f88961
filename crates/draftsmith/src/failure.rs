//! How a command ends when it does not end well: one `error:` line, then a `hint:`, and the exit code.

use std::io::Write;
use std::process::ExitCode;

use draftsmith::run::Told;

/// Done, but what was to be checked does not hold.
pub(crate) const NOT_HELD: u8 = 1;
/// The input was wrong.
pub(crate) const BAD_INPUT: u8 = 2;
/// Our bug.
pub(crate) const BUG: u8 = 101;
/// The user pressed Ctrl-C: 128 + SIGINT, as shells expect.
pub(crate) const INTERRUPTED: u8 = 130;

/// An ending with a reason.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    /// What is wrong, each with what to do about it; nothing where another process tells it.
    told: Vec<Told>,
}

impl Failure {
    fn one(code: u8, message: String, hint: Option<String>) -> Failure {
        Failure { code, told: vec![Told { message, hint }] }
    }

    /// The input was wrong.
    pub(crate) fn input(message: impl Into<String>, hint: Option<String>) -> Failure {
        Failure::one(BAD_INPUT, message.into(), hint)
    }

    /// Somebody pressed Ctrl-C.
    pub(crate) fn interrupted(message: impl Into<String>, hint: Option<String>) -> Failure {
        Failure::one(INTERRUPTED, message.into(), hint)
    }

    /// What is wrong, and what to do about it, each in one line.
    pub(crate) fn in_words(&self) -> (String, Option<String>) {
        let words = |text: Vec<&str>| text.into_iter().map(one_line).collect::<Vec<_>>().join("; ");
        let hints: Vec<&str> = self.told.iter().filter_map(|told| told.hint.as_deref()).collect();
        let message = words(self.told.iter().map(|told| told.message.as_str()).collect());
        (message, (!hints.is_empty()).then(|| words(hints)))
    }

    /// The input was wrong in all of these.
    pub(crate) fn told(told: Vec<Told>) -> Failure {
        Failure { code: BAD_INPUT, told }
    }

    /// Everything that is wrong.
    pub(crate) fn all_told(&self) -> &[Told] {
        &self.told
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// Prints it and ends.
    pub(crate) fn print(self) -> ExitCode {
        self.tell();
        ExitCode::from(self.code)
    }

    /// Prints two lines to stderr for everything that is wrong.
    pub(crate) fn tell(&self) {
        let mut text = String::new();
        for Told { message, hint } in &self.told {
            text.push_str(&format!("error: {}\n", one_line(message)));
            let general = || "correct what the line above names, and run the command again".to_string();
            if let Some(hint) = hint.clone().or_else(|| (self.code == BAD_INPUT).then(general)) {
                text.push_str(&format!("hint: {}\n", one_line(&hint)));
            }
        }
        write_at_once(&text);
    }
}

/// To stderr by one call of the system: a launcher of several processes mixes what they write, call by call.
fn write_at_once(text: &str) {
    let mut err = std::io::stderr().lock();
    let _ = err.write_all(text.as_bytes());
    let _ = err.flush();
}

/// Messages may quote what others said over several lines; ours is one.
fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

impl From<draftsmith::Error> for Failure {
    fn from(error: draftsmith::Error) -> Failure {
        let code = if error.is_interrupt() { INTERRUPTED } else { BAD_INPUT };
        Failure { code, told: error.told() }
    }
}

impl From<draftsmith::serve::ServeError> for Failure {
    fn from(error: draftsmith::serve::ServeError) -> Failure {
        let general = || "give another address or port, or fewer threads".to_string();
        Failure::input(error.to_string(), error.hint().or_else(|| Some(general())))
    }
}

/// A panic is our bug: say so in one line, with where it happened, and end with 101.
pub(crate) fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        tell(info);
        // Ends the process here whatever thread it is: a dead worker would leave the others waiting.
        std::process::exit(i32::from(BUG));
    }));
}

/// From now on a panic is told, and ends what it happened in: a server keeps it to one request.
pub(crate) fn outlive_panics() {
    std::panic::set_hook(Box::new(tell));
}

fn tell(info: &std::panic::PanicHookInfo<'_>) {
    let what = info
        .payload()
        .downcast_ref::<&str>()
        .map(|s| (*s).to_string())
        .or_else(|| info.payload().downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_string());
    let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
    write_at_once(&format!(
        "error: draftsmith has a bug: {}{place}\nhint: please report it with this line, the command and the output of \
         `draftsmith doctor --json`\n",
        one_line(&what)
    ));
}

/// How a wrong command line is put right: as its usage says, or with another value.
fn command_line_hint(error: &clap::Error, text: &str) -> String {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let usage = text.lines().find_map(|line| line.trim().strip_prefix("Usage: "));
    if let Some(usage) = usage {
        let verb = usage
            .split([' ', '[', '<'])
            .take_while(|word| word.starts_with(|c: char| c.is_ascii_lowercase()));
        let verb: Vec<&str> = verb.collect();
        return format!("write it as `{usage}`; `{} --help` explains each part", verb.join(" "));
    }
    let argument = error.get(ContextKind::InvalidArg).and_then(|value| match value {
        ContextValue::String(name) => Some(name.clone()),
        ContextValue::Strings(names) => names.first().cloned(),
        _ => None,
    });
    match (error.kind(), argument) {
        (ErrorKind::ValueValidation | ErrorKind::InvalidValue, Some(name)) => {
            format!("give `{name}` another value: `--help` behind the verb says which it takes")
        }
        (_, Some(name)) => format!("leave `{name}` out, or write it as `--help` behind the verb shows"),
        (_, None) => "begin with a verb: `draftsmith --help` lists them".to_string(),
    }
}

/// Help and version are answers; anything else is a wrong command line in our own two lines.
pub(crate) fn from_clap(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(BAD_INPUT)
        }
        _ => {
            let text = error.render().to_string();
            let mut parts = text.split("\n\n");
            let message = parts.next().unwrap_or_default().trim_start_matches("error: ").to_string();
            let tip = text.lines().find_map(|l| l.trim().strip_prefix("tip: ")).map(str::to_string);
            Failure::input(message, Some(tip.unwrap_or_else(|| command_line_hint(error, &text)))).print()
        }
    }
}
