//! Arguments of the verbs for shells and manuals: `completions`, `man`.

use std::path::PathBuf;

use clap::Args;
use clap_complete::Shell;

/// Prints a script that lets a shell complete verbs and flags.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith completions bash > ~/.local/share/bash-completion/completions/draftsmith\n  \
    draftsmith completions zsh > ~/.zfunc/_draftsmith          # a folder of $fpath\n  \
    draftsmith completions fish > ~/.config/fish/completions/draftsmith.fish\n  \
    draftsmith completions powershell >> $PROFILE")]
pub struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Prints the manual page, or writes those of all verbs into a folder.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith man | man -l -\n  draftsmith man ~/.local/share/man/man1")]
pub struct Man {
    /// Folder for `draftsmith.1`, `draftsmith-bench.1` and so on; made if it is not there.
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}
