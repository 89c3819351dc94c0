//! Manual pages and completions, made from the command line's own description.

use crate::Cli;
use clap::CommandFactory;
use std::path::Path;
use varve_control::ControlError;

/// Writes `varve.1` and a page for each command into a directory.
pub fn pages(directory: &Path) -> Result<(), ControlError> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    Ok(())
}

/// Prints the completions for a shell.
pub fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "varve", &mut std::io::stdout());
}
