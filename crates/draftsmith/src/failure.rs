//! How a command ends when it does not end well: one `error:` line, then a `hint:`, and the exit code.

use std::io::Write;
use std::process::ExitCode;

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
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// The input was wrong.
    pub(crate) fn input(message: impl Into<String>, hint: Option<String>) -> Failure {
        Failure { code: BAD_INPUT, message: message.into(), hint }
    }

    /// Somebody pressed Ctrl-C.
    pub(crate) fn interrupted(message: impl Into<String>, hint: Option<String>) -> Failure {
        Failure { code: INTERRUPTED, message: message.into(), hint }
    }

    /// Prints both lines to stderr.
    pub(crate) fn print(self) -> ExitCode {
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "error: {}", one_line(&self.message));
        let help = || "`draftsmith --help` (or after a verb) lists what there is".to_string();
        let hint = self.hint.or_else(|| (self.code == BAD_INPUT).then(help));
        if let Some(hint) = hint {
            let _ = writeln!(err, "hint: {}", one_line(&hint));
        }
        ExitCode::from(self.code)
    }
}

/// Messages may quote what others said over several lines; ours is one.
fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

impl From<draftsmith::Error> for Failure {
    fn from(error: draftsmith::Error) -> Failure {
        let code = if error.is_interrupt() { INTERRUPTED } else { BAD_INPUT };
        Failure { code, message: error.to_string(), hint: error.hint() }
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
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "error: draftsmith has a bug: {}{place}", one_line(&what));
    let _ = writeln!(
        err,
        "hint: please report it with this line, the command and the output of `draftsmith doctor --json`"
    );
    let _ = err.flush();
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
            let hint = tip
                .unwrap_or_else(|| "`draftsmith --help` (or after a verb) lists what there is".to_string());
            Failure::input(message, Some(hint)).print()
        }
    }
}
