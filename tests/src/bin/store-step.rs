//! `store-step STEP ROOT`: one thing that the daemon or the command does with a store, as a process of its own, so that a tracer can let any of its system
//! calls fail. Before the step and behind it, it yields the processor (`sched_yield`): the rest is only a program's start and end.
//!
//! Says `ok`, or `error CODE: WORDS` and ends with 1. Anything else is a fault.

use std::path::Path;
use std::process::ExitCode;
use varve_cli::Output;
use varve_cli::copy_out::{Identity, Options, Source, Target, copy_out};
use varve_store::{Compression, StoreError, salvage};
use varve_tests::sample::{map_all, open_keyed, prune_to, scrub_stored, settle_all};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [step, root] = &arguments[..] else {
        eprintln!("store-step STEP ROOT");
        return ExitCode::from(2);
    };
    let done = match &step[..] {
        "export" => export(Path::new(root)),
        step => store(step, Path::new(root)),
    };
    std::thread::yield_now();
    match done {
        Ok(()) => {
            println!("ok");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("error {why}");
            ExitCode::from(1)
        }
    }
}

/// What a store says is an error, and so is what it says is damaged.
fn store(step: &str, root: &Path) -> Result<(), String> {
    let named = |error: StoreError| format!("{}: {error}", error.code());
    if step != "scrub-stored" {
        std::thread::yield_now();
    }
    if step == "salvage" {
        let done = salvage(root, &root.with_extension("salvaged"), |_, _| true).map_err(named)?;
        return match done.unreadable.first() {
            None => Ok(()),
            Some(first) => Err(format!("told-unreadable: {first:?} and perhaps others")),
        };
    }
    let mut store = open_keyed(root).map_err(named)?;
    let done = match step {
        "settle" => settle_all(&mut store, Compression::Zstd(1)).map(drop),
        "merge" => map_all(&mut store).map(drop),
        "prune" => prune_to(&mut store, 30, Compression::Lz4).map(drop),
        "scrub-stored" => {
            // What opening the store made good is not for a scrub to say.
            std::thread::yield_now();
            return match scrub_stored(&store).damage.first() {
                None => Ok(()),
                Some(first) => Err(format!("told-damaged: {}", first.what)),
            };
        }
        "pin" => store.pin(store.timeline().end()),
        _ => panic!("no step is called {step}"),
    };
    done.map_err(named)?;
    match store.damaged() {
        [] => Ok(()),
        damaged => Err(format!("told-damaged: {}", damaged.join("; "))),
    }
}

fn export(root: &Path) -> Result<(), String> {
    let (source, target) = (root.join("source"), root.join("target"));
    let bytes = std::fs::metadata(&source)
        .map_err(|e| format!("test: {e}"))?
        .len();
    let identity = Identity {
        name: "sample/lsn:1".to_owned(),
        time_ns: 1,
        bytes,
    };
    let source = Source {
        path: &source,
        bytes,
        identity: Some(&identity),
    };
    let options = Options {
        only: None,
        overwrite: false,
        verify: true,
    };
    std::thread::yield_now();
    let output = Output {
        program: "store-step",
        json: true,
        quiet: true,
    };
    copy_out(&output, source, &Target::File(target), options)
        .map(drop)
        .map_err(|error| format!("{}: {}", error.code, error.message))
}
