//! Signals: the wish to end, and for `serve` the wish to read the draft anew.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use draftsmith::report::Stop;

use crate::failure::INTERRUPTED;

/// The first time asks for the next safe point, the second ends at once.
fn end(stop: &Stop, tells: bool) {
    if stop.requested() {
        std::process::exit(i32::from(INTERRUPTED));
    }
    stop.request();
    if tells {
        let _ = writeln!(
            std::io::stderr(),
            "\nstopping at the next safe point; press Ctrl-C again to stop at once"
        );
    }
}

/// Asks for a stop on SIGINT, SIGTERM and SIGHUP; where somebody reloads, SIGHUP sets `reload` instead. Of several
/// processes one `tells` the user.
///
/// Without a handler a signal just ends us, and everything on disk is still whole: no reason not to start.
#[cfg(unix)]
pub(crate) fn watch(stop: Stop, reload: Option<Arc<AtomicBool>>, tells: bool) {
    use std::sync::atomic::Ordering;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    std::thread::spawn(move || {
        for signal in &mut signals {
            match &reload {
                Some(reload) if signal == SIGHUP => reload.store(true, Ordering::SeqCst),
                _ => end(&stop, tells),
            }
        }
    });
}

/// Asks for a stop on Ctrl-C and its like; nothing reloads here.
#[cfg(not(unix))]
pub(crate) fn watch(stop: Stop, _reload: Option<Arc<AtomicBool>>, tells: bool) {
    let _ = ctrlc::set_handler(move || end(&stop, tells));
}
