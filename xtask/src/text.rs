//! What may not stand in any file of the tree.

use anyhow::Result;

use crate::source::Source;
use crate::tree::{Findings, Tree};

/// What only the binary does, and how code spells it.
const BINARY_ALONE: [&str; 5] = ["env::var", "env::set_var", "env::args", "process::exit", "process::abort"];
/// Starts what `CXX` names, for tests of kernels on the host.
const SHIM: &str = "crates/cuda/src/shim.rs";

/// Crates above the engine: what is computed on is chosen in one place and handed down.
const ABOVE_DECODE: [&str; 6] = [
    "crates/bench/src/",
    "crates/bundle/src/",
    "crates/capture/src/",
    "crates/draftsmith/src/",
    "crates/run/src/",
    "crates/serve/src/",
];
/// That place, and stages that compute beside a device.
const NAMES_CPU: [&str; 3] =
    ["crates/run/src/host.rs", "crates/run/src/capture.rs", "crates/run/src/rates.rs"];

const LINES_MAX: usize = 1500;
/// Compute, and call what computes: these may be `unsafe`.
const KERNEL_CRATES: [&str; 2] = ["crates/kernels/", "crates/cuda/"];
/// Maps weight files into memory: the one `unsafe` outside the kernels.
const MAPPED: &str = "crates/formats/src/mapped.rs";

/// Files written by programs, or foreign: not read line by line.
fn is_foreign(file: &str) -> bool {
    file == "Cargo.lock"
        || file == "docs/CLI.md"
        || file.ends_with(".snap")
        || file.contains("/licenses/")
        || file == "LICENSE-APACHE"
}

fn is_text(file: &str) -> bool {
    let ends = [
        ".rs", ".md", ".toml", ".py", ".sh", ".html", ".css", ".js", ".yml", ".yaml", ".cu", ".cuh", ".h",
        ".cpp",
    ];
    ends.iter().any(|e| file.ends_with(e)) || file == ".ci/run" || file == "NOTICE"
}

pub(crate) fn check(tree: &Tree, findings: &mut Findings) -> Result<()> {
    // Written in halves, so that this file does not find itself.
    let marks = [concat!("FIX", "ME"), concat!("todo", "!("), concat!("XX", "X:")];
    let machines = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
        concat!("/tmp/", "pip"),
        concat!("../sha", "red"),
    ];
    let hosts = [
        concat!("py", "pi.org"),
        concat!("python", "hosted.org"),
        concat!("static.", "crates.io"),
        concat!("index.", "crates.io"),
        concat!("registry.", "npmjs"),
        concat!("deb.", "debian.org"),
    ];
    for file in tree.files.iter().filter(|f| is_text(f) && !is_foreign(f)) {
        let Ok(text) = std::fs::read_to_string(tree.root.join(file)) else {
            findings.push(format!("{file}: not UTF-8"));
            continue;
        };
        let lines = text.lines().count();
        // What the program writes is as long as what was measured.
        if lines > LINES_MAX && !file.contains("/results/") {
            findings.push(format!("{file}: {lines} lines, at most {LINES_MAX} are allowed"));
        }
        for (n, line) in text.lines().enumerate() {
            let mut found = |what: &str, mark: &str| {
                findings.push(format!("{file}:{}: {what} `{mark}`", n + 1));
            };
            marks.iter().filter(|m| line.contains(**m)).for_each(|m| found("leftover", m));
            // Tests make up paths of somebody's machine to see that they are not shown.
            let made_up = line.contains("/somebody");
            let machines = machines.iter().filter(|m| line.contains(**m) && !made_up);
            machines.for_each(|m| found("path of one machine", m));
            hosts.iter().filter(|m| line.contains(**m)).for_each(|m| found("host of a registry", m));
            let code = line.trim_start();
            let is_unsafe = ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|u| code.contains(u));
            if file.ends_with(".rs")
                && is_unsafe
                && !code.starts_with("//")
                && !KERNEL_CRATES.iter().any(|folder| file.starts_with(folder))
                && !file.starts_with("xtask/")
                && file != MAPPED
            {
                found("only the crates of kernels may hold", "unsafe");
            }
        }
        let is_library =
            file.starts_with("crates/") && file.contains("/src/") && !file.starts_with("crates/draftsmith/");
        if file.ends_with(".rs") && is_library && !file.ends_with("/tests.rs") && file != SHIM {
            let code = Source::of(&text).code;
            for what in BINARY_ALONE.iter().filter(|what| code.contains(**what)) {
                findings.push(format!("{file}: only the binary reads the environment or exits: `{what}`"));
            }
        }
        let is_above = ABOVE_DECODE.iter().any(|folder| file.starts_with(folder));
        if file.ends_with(".rs") && is_above && !NAMES_CPU.contains(&file.as_str()) && names_cpu(&text) {
            findings.push(format!("{file}: above `decode` only `run::host` names the kernels `Cpu`"));
        }
        if file.ends_with(".rs")
            && !file.contains("/tests/")
            && !file.ends_with("/tests.rs")
            && !text.starts_with("//!")
        {
            findings.push(format!("{file}:1: no `//!` that says what this module is"));
        }
    }
    let lock = tree.read("Cargo.lock")?;
    let one = concat!("registry+https://github.com/rust-lang/", "crates.io-index");
    for line in lock.lines().filter(|l| l.starts_with("source = ") && !l.contains(one)) {
        findings.push(format!("Cargo.lock: `{line}` is not the public registry"));
    }
    Ok(())
}

/// Whether a source takes `Cpu` from the kernels, outside its tests.
fn names_cpu(text: &str) -> bool {
    let code = Source::of(text).code;
    code.match_indices("kernels::").any(|(at, word)| {
        let rest = &code[at + word.len()..];
        let named = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default(),
        };
        named.split(|c: char| !c.is_alphanumeric() && c != '_').any(|name| name == "Cpu")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_the_cpu_are_found_in_paths_and_lists_and_not_in_tests() {
        for named in [
            "use draftsmith_kernels::Cpu;",
            "use draftsmith_kernels::{\n    Cpu, Kernels,\n};",
            "kernels::Cpu::new(1)",
        ] {
            assert!(names_cpu(named), "{named}");
        }
        for other in [
            "use draftsmith_kernels::{CpuFeatures};",
            "Device::Cpu",
            "// kernels::Cpu",
            "#[cfg(test)]\nmod tests {\n    use kernels::Cpu;\n}",
        ] {
            assert!(!names_cpu(other), "{other}");
        }
    }
}
