//! What `completions` and `man` write: scripts and pages made from the command line as data.

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;

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
