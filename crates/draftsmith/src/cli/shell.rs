//! Arguments of the verbs for shells and manuals: `completions`, `man`; and what they write.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;

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

/// The script for a shell.
pub fn completion_script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "draftsmith", &mut script);
    script
}

/// Manual pages of the program and of every verb, `(file name, roff)`; the program's own first.
pub fn man_pages() -> Vec<(String, Vec<u8>)> {
    let mut command = Cli::command();
    command.build();
    let mut pages = Vec::new();
    add_pages(&command, &mut pages);
    pages
}

fn add_pages(command: &clap::Command, pages: &mut Vec<(String, Vec<u8>)>) {
    let title = command.get_display_name().unwrap_or(command.get_name()).to_string();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).expect("memory takes any text");
    pages.push((format!("{title}.1"), page));
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        add_pages(verb, pages);
    }
}
