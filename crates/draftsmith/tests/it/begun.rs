//! `draft.from`: training that begins with a draft.

use std::path::Path;

use crate::stages::{bytes, finish};
use crate::support::Home;

const SMALL: [&str; 12] = [
    "data.sources.0.max_rows=40",
    "regenerate.max_rows=20",
    "regenerate.max_new_tokens=16",
    "train.max_steps=4",
    "train.tokens_per_step=256",
    "train.pack_length=256",
    "validate.every=4",
    "validate.prompts=2",
    "validate.max_new_tokens=8",
    "bench.limit=2",
    "bench.max_new_tokens=8",
    "bench.depth=2",
];

fn arguments(dir: &Path, more: &[&str]) -> Vec<String> {
    let start = ["run".to_owned(), "recipes/smoke.toml".to_owned(), format!("run.dir={}", dir.display())];
    start.into_iter().chain(SMALL.iter().chain(more).map(|text| (*text).to_owned())).collect()
}

#[test]
fn training_begins_with_the_weights_of_a_draft_and_its_card_says_so() {
    let home = Home::new();
    let (first, again) = (home.path().join("first"), home.path().join("again"));
    finish(home.spawn(&arguments(&first, &[])));
    let from = format!("draft.from={}", first.display());
    // At this rate no weight moves.
    let still = [from.as_str(), "train.max_steps=1", "train.lr=1e-30", "validate.every=1", "train.seed=5"];
    let said = finish(home.spawn(&arguments(&again, &still)));
    assert!(said.contains("train: begins with the weights of `tiny-target-eagle3`"), "{said}");
    let weights = |dir: &Path| bytes(dir.join("bundle/model.safetensors"));
    assert!(weights(&first) == weights(&again), "weights moved, or did not begin there");
    let manifest = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&bytes(dir.join("bundle/bundle.json"))).unwrap()
    };
    let begun_with = &manifest(&again)["training"]["begun_with"];
    let file = |entry: &&serde_json::Value| entry["path"] == "model.safetensors";
    let first_manifest = manifest(&first);
    let entry = first_manifest["files"].as_array().unwrap().iter().find(file).unwrap();
    assert_eq!(
        (&begun_with["name"], &begun_with["weights_sha256"]),
        (&"tiny-target-eagle3".into(), &entry["sha256"])
    );
    assert!(first_manifest["training"].get("begun_with").is_none());
    let card = String::from_utf8(bytes(again.join("bundle/README.md"))).unwrap();
    assert!(card.contains("It began with the weights of tiny-target-eagle3 (sha256 `"), "{card}");
    // The run file that is kept stands for itself, and what is done is found.
    let kept = again.join("run.toml").display().to_string();
    assert!(finish(home.spawn(&["run".to_owned(), kept])).contains("train: done before"));
    // A draft of the same place and other weights is another beginning.
    finish(home.spawn(&arguments(&first, &["train.max_steps=5"])));
    let said = finish(home.spawn(&arguments(&again, &still)));
    assert!(said.contains("train: inputs changed (content of draft.from"), "{said}");
    assert!(said.contains("capture: done before"), "{said}");
    assert!(weights(&first) == weights(&again));
}

#[test]
fn a_draft_that_cannot_be_begun_with_is_refused_before_any_work() {
    let home = Home::new();
    let (first, dir) = (home.path().join("first"), home.path().join("run"));
    finish(home.spawn(&arguments(&first, &[])));
    let first = format!("draft.from={}", first.display());
    let tiny =
        format!("draft.from={}", crate::support::repository().join("fixtures/tiny-drafts/dspark").display());
    let own = tiny.replace("dspark", "eagle3");
    for (more, wanted) in [
        (&["draft.from=nobody"][..], "`draft.from`: bundle `nobody` does not exist"),
        (&["draft.from=./nobody"], "does not exist"),
        (&["draft.from=fixtures"], "no bundle is called `fixtures`"),
        (
            &["draft.from=smollm2-135m-instruct-eagle3"],
            "is for another target: tokens 49152, and this one has 1024",
        ),
        (&[&first, "draft.vocab_size=64"], "`draft.vocab_size` is 64, and draft `tiny-target-eagle3`"),
        (
            &[&first, "capture.layers=[0, 1, 2]"],
            "`capture.layers` is [0, 1, 2], and draft `tiny-target-eagle3`",
        ),
        (&[&first, "draft.size=auto"], "`draft.size` is set beside `draft.from`"),
        (&[&tiny], "is of kind `dspark`, and `draft.method` is `eagle3`"),
        (&[&own, "draft.intermediate=16"], "is another network than this run would train"),
    ] {
        let output = home.spawn(&arguments(&dir, more)).wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {stderr}");
        assert!(stderr.contains(wanted) && stderr.contains("hint: "), "{more:?}: {stderr}");
        assert!(!dir.exists(), "{more:?}");
    }
    let itself = home.spawn(&arguments(Path::new(first.trim_start_matches("draft.from=")), &[&first]));
    let output = itself.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("is the bundle that this very run makes"), "{stderr}");
}
