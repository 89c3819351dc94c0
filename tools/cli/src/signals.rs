//! What a command leaves behind when it is broken off: nothing.

use nix::sys::signal::{SigSet, Signal};

/// From here on ^C, a hang-up and SIGTERM first do `work`, then end the process, with the exit code that they end processes with. Threads that begin later
/// leave them to this.
pub fn at_signal(work: impl FnOnce() + Send + 'static) {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    if signals.thread_block().is_err() {
        return;
    }
    std::thread::spawn(move || {
        let signal = signals.wait().map_or(0, |signal| signal as i32);
        work();
        std::process::exit(128 + signal);
    });
}
