//! What a process holds in memory is nobody else's.

use nix::sys::resource::{Resource, setrlimit};

/// No core of this process is written, and nobody but root looks into its memory: users' data and keys are there.
pub fn keep_memory_secret(program: &str) {
    let limited = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let hidden = nix::sys::prctl::set_dumpable(false);
    if let Err(errno) = limited.and(hidden) {
        eprintln!("{program}: core dumps of this process cannot be forbidden: {errno}");
    }
}
