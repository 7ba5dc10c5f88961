//! A program that was built without stores knows their keys and addresses, and says what it lacks.

use crate::support::{Ended, Home};

#[test]
fn a_store_that_was_not_built_in_is_one_error_with_how_to_build_it() {
    let home = Home::new();
    let dir = format!("run.dir={}", home.path().join("run").display());
    let check = |more: &str, told: &str| {
        let args = ["run", "recipes/smoke.toml", &dir, more].map(str::to_string);
        let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        let of =
            |start: &str| ended.stderr.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
        let (errors, hints) = (of("error:"), of("hint:"));
        assert!(errors.len() == 1 && errors[0].contains(told), "{}", ended.stderr);
        assert!(hints.len() == 1 && hints[0].contains("--features object-store"), "{}", ended.stderr);
    };
    check("capture.store.url=s3://bucket/x", "`capture.store` is set, but this program was built without");
    check(
        "data.sources.0.path=s3://bucket/x.jsonl",
        "`data.sources.0.path`: `s3://bucket/x.jsonl` lies in a store, but this program was built without",
    );
    check("data.validation=file:///x.jsonl", "`file:///x.jsonl` lies in a store");
    assert!(!home.path().join("run/state/data.json").exists(), "nothing was begun");
}
