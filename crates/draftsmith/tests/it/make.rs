//! From a target to a verdict: the bill before the work, run files that are written by rules, and the last word.

use serde_json::Value;

use crate::support::{Home, repository};

fn recipe() -> (String, String) {
    let tiny = repository().join("fixtures/tiny-target");
    (tiny.display().to_string(), tiny.join("prompts-train.jsonl").display().to_string())
}

/// A run file over the tiny target in a folder of its own.
fn run_file(home: &Home, more: &str) {
    let (target, data) = recipe();
    let text = format!(
        "[run]\nname = \"a\"\n[target]\nsource = \"{target}\"\n[data]\nsources = [{{ path = \"{data}\", max_rows = 60 }}]\n\
         max_length = 256\nvalidation_rows = 16\n[regenerate]\nmax_new_tokens = 32\n[draft]\nvocab_size = 512\n\
         [train]\npack_length = 256\ntokens_per_step = 512\nepochs = 6\nmax_steps = 12\n[validate]\nevery = 6\nprompts = 4\n\
         max_new_tokens = 16\n[bundle]\nlicense = \"MIT\"\n{more}"
    );
    home.write("a.toml", text);
}

fn stage<'v>(plan: &'v Value, name: &str) -> &'v Value {
    let stages = plan["stages"].as_array().unwrap();
    stages.iter().find(|s| s["stage"] == name).unwrap_or_else(|| panic!("{name} in {plan}"))
}

#[test]
fn the_bill_of_a_run_makes_nothing_and_done_stages_cost_nothing() {
    let home = Home::new();
    run_file(&home, "");
    let plan = home.run(&["run", "a.toml", "--plan", "--json"]).json();
    assert!(!home.path().join("runs").exists(), "nothing may be written");
    for name in ["data", "regenerate", "capture", "train", "bundle"] {
        let stage = stage(&plan, name);
        assert_eq!(stage["state"], "waiting", "{stage}");
        assert!(stage["seconds"].as_f64().is_some_and(|s| (0.0..600.0).contains(&s)), "{stage}");
        assert!(!stage["how"].as_str().unwrap().is_empty(), "{stage}");
    }
    assert_eq!(stage(&plan, "train")["steps"], 12);
    assert!(stage(&plan, "capture")["disk_bytes"].as_u64().is_some_and(|b| b > 0), "{plan}");
    assert!(plan["measured"].as_str().unwrap().starts_with("measured now"), "{plan}");
    // 60 rows and 12 steps are few, and 4 prompts cannot choose.
    let about: Vec<&str> =
        plan["warnings"].as_array().unwrap().iter().map(|w| w["about"].as_str().unwrap()).collect();
    assert!(
        about.contains(&"data") && about.contains(&"steps") && about.contains(&"validation"),
        "{about:?}"
    );
    let page = home.run(&["run", "a.toml", "--plan"]);
    assert_eq!(page.code, Some(0), "{}", page.stderr);
    assert!(
        page.stdout.contains("regenerate") && page.stdout.contains("warning     steps: 12"),
        "{}",
        page.stdout
    );
    assert!(page.stdout.contains("measured 0 min ago"), "{}", page.stdout);

    // The warnings come before the work, too, and with the verdict.
    let done = home.run(&["run", "a.toml", "--json"]);
    assert!(done.stderr.contains("warning: steps: 12 optimiser steps are few"), "{}", done.stderr);
    let result = done.json();
    assert_eq!(result["verdict"]["worth"], "unmeasured", "{result}");
    assert!(result["verdict"]["next"].as_str().unwrap().starts_with("draftsmith bench --bundle"), "{result}");
    let limits = result["verdict"]["limits"].to_string();
    assert!(limits.contains("12 optimiser steps"), "{limits}");
    let plan = home.run(&["run", "a.toml", "--plan", "--json"]).json();
    assert_eq!((&plan["seconds"], &plan["disk_bytes"]), (&Value::from(0.0), &Value::from(0)), "{plan}");
    assert!(plan["stages"].as_array().unwrap().iter().all(|s| s["state"] == "done"), "{plan}");
    let plan = home.run(&["run", "a.toml", "--plan", "--json", "train.max_steps=24"]).json();
    assert_eq!(stage(&plan, "capture")["state"], "done");
    assert_eq!(stage(&plan, "train")["state"], "waiting");
}

#[test]
fn the_bill_for_several_ranks_says_what_they_share_and_what_they_do_not() {
    let home = Home::new();
    run_file(&home, "");
    let of = |more: &[&str]| {
        let args =
            ["run", "a.toml", "train.tokens_per_step=1024", "train.pack_length=256", "--plan", "--json"];
        home.run(&args.into_iter().chain(more.iter().copied()).collect::<Vec<_>>()).json()
    };
    let one = of(&[]);
    assert!(one.get("ranks").is_none() && stage(&one, "train").get("sent_bytes").is_none(), "{one}");
    let four = of(&["--ranks", "4", "--link-gbit", "8"]);
    assert!(!home.path().join("runs").exists(), "nothing may be written");
    let ranks = &four["ranks"];
    assert_eq!(
        (&ranks["ranks"], &ranks["link_bytes_per_s"]),
        (&Value::from(4), &Value::from(1e9)),
        "{ranks}"
    );
    assert_eq!(ranks["micro_batches"], 4);
    let seconds = |plan: &Value, name: &str| stage(plan, name)["seconds"].as_f64().unwrap();
    // The rates of the first plan are kept, so all but what is shared is the same.
    for name in ["data", "bundle"] {
        assert_eq!(seconds(&four, name), stage(&four, name)["fixed_seconds"].as_f64().unwrap(), "{name}");
    }
    assert_eq!(seconds(&four, "bundle"), seconds(&one, "bundle"));
    for name in ["regenerate", "capture", "train"] {
        assert!(seconds(&four, name) < seconds(&one, name), "{name}: {four}");
    }
    let (sent, steps) = (stage(&four, "train")["sent_bytes"].as_u64().unwrap(), 12);
    assert_eq!(sent, steps * ranks["sent_bytes_a_step"].as_u64().unwrap());
    let total = |plan: &Value| plan["seconds"].as_f64().unwrap();
    assert!(ranks["fixed_seconds"].as_f64().unwrap() < total(&four), "{ranks}");
    assert!((ranks["alone_seconds"].as_f64().unwrap() - total(&one)).abs() < 0.5, "{ranks}");
    let memory = |plan: &Value| plan["memory_bytes"].as_u64().unwrap();
    assert_eq!(ranks["one_machine_memory_bytes"].as_u64().unwrap(), 4 * memory(&four));
    // Micro-batches that do not go round are told with what to write.
    let page = home.run(&[
        "run",
        "a.toml",
        "train.tokens_per_step=1024",
        "train.pack_length=256",
        "--plan",
        "--ranks",
        "3",
    ]);
    for text in [
        "ranks       3: one process takes",
        "in its last round 2 ranks wait for 1",
        "`train.tokens_per_step = 1536`",
    ] {
        assert!(page.stdout.contains(text), "{text}: {}", page.stdout);
    }
    let alone = home.run(&["run", "a.toml", "--ranks", "2"]);
    assert!(alone.code == Some(2) && alone.stderr.contains("--plan"), "{}", alone.stderr);
    let none = home.run(&["run", "a.toml", "--plan", "--ranks", "0"]);
    assert!(none.code == Some(2) && none.stderr.contains("--ranks"), "{}", none.stderr);
}

#[test]
fn one_command_makes_a_draft_and_goes_on_where_it_stopped() {
    let home = Home::new();
    let (target, data) = recipe();
    let make = |more: &[&str]| {
        let args = ["make", &target, "--data", &data, "--hours", "0.01", "--name", "tiny"];
        home.run(&args.into_iter().chain(more.iter().copied()).collect::<Vec<_>>())
    };
    let plan = make(&["--plan", "--json"]).json();
    assert_eq!(stage(&plan, "bench")["state"], "waiting");
    assert!(!home.path().join("runs").exists(), "nothing may be made");
    let text = std::fs::read_to_string(home.path().join("tiny.toml")).unwrap();
    assert!(text.starts_with("# draftsmith init ") && text.contains("size = \"auto\""), "{text}");
    for file in ["tiny-held-out.jsonl", "tiny-own.jsonl"] {
        assert!(home.path().join(file).is_file(), "{file}");
    }
    let first = make(&["--json"]);
    assert!(
        first.stderr.contains("is there: it goes on") && first.stderr.contains("rates "),
        "{}",
        first.stderr
    );
    let result = first.json();
    let verdict = &result["verdict"];
    assert!(["yes", "unsure", "no"].contains(&verdict["worth"].as_str().unwrap()), "{verdict}");
    assert_eq!(verdict["workloads"][0], "tiny-own", "{verdict}");
    assert!(verdict["speedup"].as_f64().is_some(), "{verdict}");
    // The bill from before the work, beside what it took.
    let planned = &result["planned"];
    let held = |key: &str| planned[key].as_f64().unwrap();
    assert_eq!(stage(planned, "train")["seconds"], stage(&result, "train")["seconds"], "{planned}");
    assert!(held("planned_seconds") > 0.0 && held("seconds") > 0.0, "{planned}");
    let there = std::fs::metadata(home.path().join("runs/tiny/regenerate/answers.jsonl")).unwrap().len();
    assert!(stage(planned, "regenerate")["disk_bytes"].as_u64().unwrap() >= there, "{planned}");
    assert!(held("memory_bytes") > 1e6 && held("planned_memory_bytes") > 1e6, "{planned}");
    let status = home.run(&["status", "runs/tiny", "--json"]).json();
    let bill = &stage(planned, "train")["planned_seconds"];
    assert_eq!(
        (&stage(&status, "train")["planned_seconds"], stage(&status, "train")["state"].as_str()),
        (bill, Some("done"))
    );
    // What does not pay is not recommended, here or in card and report.
    if verdict["worth"] == "no" {
        assert!(!verdict["next"].as_str().unwrap().contains("serve"), "{verdict}");
    }
    let bundle = home.path().join("runs/tiny/bundle");
    let card = std::fs::read_to_string(bundle.join("README.md")).unwrap();
    let says = verdict["says"].as_str().unwrap();
    assert!(card.contains(&says[1..]), "{card}");
    assert!(
        std::fs::read_to_string(bundle.join("results/report.html")).unwrap().contains("class=\"verdict\"")
    );
    let again = make(&[]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert!(
        again.stderr.contains("bench: done before")
            && again.stdout.contains("verdict     ")
            && again.stdout.contains(" that were planned: "),
        "{}",
        again.stdout
    );

    // Another command does not write over it.
    let other = home.run(&["make", &target, "--data", &data, "--hours", "0.02", "--name", "tiny"]);
    assert!(other.code == Some(2) && other.stderr.contains("another command made it"), "{}", other.stderr);
    let other = home.run(&["init", &target, "--data", &data, "--name", "tiny"]);
    assert!(other.code == Some(2) && other.stderr.contains("--replace"), "{}", other.stderr);

    // The setting that is found to be fastest is kept, and used.
    let bundle = bundle.display().to_string();
    let tune = [
        "bench",
        "tune",
        "--bundle",
        &bundle,
        "--workload",
        "tiny-own.jsonl",
        "--limit",
        "4",
        "--max-new-tokens",
        "8",
        "--sequences",
        "1",
        "--write",
    ];
    let tuned = home.run(&tune);
    assert_eq!(tuned.code, Some(0), "{}", tuned.stderr);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(home.path().join("runs/tiny/bundle/bundle.json")).unwrap())
            .unwrap();
    let shape = manifest["recommended"]["tuned"]["drafting"]["shape"].as_str().unwrap();
    assert!(["plain", "auto", "chain", "tree"].contains(&shape), "{manifest}");
    let check = home.run(&["bundle", "check", &bundle]);
    assert_eq!(check.code, Some(0), "{}{}", check.stdout, check.stderr);
    // The target comes from the bundle, and the bundle from the folder of the run.
    let said = home.run(&["generate", "--bundle", "runs/tiny", "--prompt", "a", "--json"]).json();
    assert!(shape != "plain" || said["accept_len"].is_null(), "{said} {shape}");
}

#[test]
fn what_no_run_can_be_made_of_is_told() {
    let home = Home::new();
    let (target, _) = recipe();
    let row = "{\"messages\":[{\"role\":\"user\",\"content\":\"Say NUMBER.\"}]}\n";
    let few: String = (0..5).map(|n| row.replace("NUMBER", &n.to_string())).collect();
    home.write("few.jsonl", few);
    for (args, message) in [
        (vec!["--data", "few.jsonl"], "5 different conversations are too few: 12 are the least"),
        (vec!["--data", "none.jsonl"], "`--data none.jsonl` is not a file"),
        (vec!["--hours", "0"], "expected hours"),
    ] {
        let args: Vec<&str> = ["init", &target].into_iter().chain(args).collect();
        let ended = home.run(&args);
        assert!(ended.code == Some(2) && ended.stderr.contains(message), "{}", ended.stderr);
        assert!(ended.stderr.contains("hint: "), "{}", ended.stderr);
        let left = std::fs::read_dir(home.path()).unwrap().flatten().map(|e| e.file_name());
        let left: Vec<_> = left.filter(|name| name.to_string_lossy().ends_with(".toml")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
