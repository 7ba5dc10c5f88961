//! Rejections that training finds are those of decoding: every kind of draft, trained a little on answers of the small
//! target, proposes over them, and the decode engine, asked for the same answers, rejects the same tokens.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use draftsmith_capture::{InProcess, TokenRow};
use draftsmith_core::VocabMap;
use draftsmith_decode::{DraftPlan, Engine, GenerateOptions, TokenOrigin, drafter};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::run::RunFile;
use draftsmith_kernels::{Cpu, PackMode};
use draftsmith_model::{Draft, DraftConfig, DraftTensors, Precision, Target, TargetTensors};
use draftsmith_train::{
    Alone, End, Flow, Hooks, Method, Mode, OwnHead, Pack, RowStore, TrainOptions, method, train, walk,
};

struct Rows(Vec<CaptureRow>);

impl RowStore for Rows {
    fn num_rows(&self) -> usize {
        self.0.len()
    }
    fn row_slots(&self, row: usize) -> usize {
        self.0[row].ids.len()
    }
    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(rows.iter().map(|row| self.0[*row].clone()).collect())
    }
}

fn target_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target")
}

fn prompts() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(target_path().join("expected.jsonl")).unwrap();
    let ids = |line: &str| {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        v["prompt_token_ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    text.lines().map(ids).collect()
}

/// The target's own answers with their states.
fn rows(target: &Arc<Target<Cpu>>, layers: &[u32]) -> Vec<CaptureRow> {
    let engine = Engine::new(Arc::clone(target), None);
    let layers = layers.iter().map(|l| draftsmith_core::LayerId(*l)).collect();
    let capture = InProcess::new(Arc::clone(target), layers);
    let answer = |prompt: Vec<u32>| {
        let options = GenerateOptions { max_new_tokens: 60, ..GenerateOptions::default() };
        let done = engine.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let ids = [&prompt[..], &done.token_ids].concat();
        let loss_mask = (0..ids.len()).map(|at| at >= prompt.len()).collect();
        capture.capture(TokenRow { number: 0, ids, loss_mask }).unwrap()
    };
    prompts().into_iter().map(answer).collect()
}

fn run_file(kind: &str, share: f64) -> RunFile {
    let text = format!(
        "[target]\nsource = \"-\"\n[data]\nsources = [{{ path = \"-\" }}]\nmax_length = 128\n\
         [draft]\nmethod = \"{kind}\"\nvocab_size = 878\ninit = \"random\"\nintermediate = 96\n\
         [draft.dflash]\nblock_size = 5\n[draft.dspark]\nblock_size = 4\nmarkov_rank = 16\n\
         [draft.p-eagle]\nlayers = 2\ndepths = 4\n\
         [train]\nlr = 4e-3\nepochs = 40\nmax_steps = 40\ntokens_per_step = 256\npack_length = 128\n\
         [train.replay]\nshare = {share}\ntokens = 128\nevery = 2\nbuffer = 6\n\
         [train.eagle3]\nttt_length = 4\n"
    );
    RunFile::parse(Path::new("run.toml"), &text, &[]).unwrap()
}

/// The target's own head, as runs on a CPU have it.
fn own_head(target: &Arc<Target<Cpu>>) -> OwnHead {
    let target = Arc::clone(target);
    Arc::new(move |states: &[f32]| target.tops(states))
}

fn untrained(
    target: &Target<Cpu>,
    file: &RunFile,
    layers: &[u32],
    own_head: Option<OwnHead>,
) -> Box<dyn Method<Kernels = Cpu>> {
    // Some of the target's choices cannot be proposed.
    let ids: Vec<u32> = (0..1024).filter(|id| id % 7 != 5).collect();
    let map = VocabMap::from_target_ids(&ids, 1024).unwrap();
    let mut config = DraftConfig::from_table(&file.draft, target.config(), ids.len()).unwrap();
    config.set_target_layers(layers).unwrap();
    config.set_mask_token(1023);
    let tensors = TargetTensors::load(&target_path()).unwrap();
    method(Cpu::new(2), config, file, map, &tensors, own_head).unwrap()
}

fn trained(
    target: &Arc<Target<Cpu>>,
    kind: &str,
    share: f64,
    layers: &[u32],
    rows: &[CaptureRow],
) -> Box<dyn Method<Kernels = Cpu>> {
    let file = run_file(kind, share);
    let mut method = untrained(target, &file, layers, Some(own_head(target)));
    let dir = tempfile::tempdir().unwrap();
    let options = TrainOptions::from_run(&file, dir.path().to_path_buf(), "key".into());
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective: &Alone };
    assert!(train(method.as_mut(), &mut Rows(rows.to_vec()), &options, hooks).unwrap().finished);
    let log = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last.get("replay").is_some(), share > 0.0, "{last}");
    if share > 0.0 {
        let replay = &last["replay"];
        assert!(replay["seconds"].as_f64().unwrap() > 0.0 && replay["positions"].as_u64().unwrap() > 0);
        assert!(replay["slots"].as_u64().unwrap() > 0 && replay["slots"].as_u64().unwrap() <= 128);
        assert!(replay["buffered_rows"].as_u64().unwrap() <= 6 && replay["loss"].as_f64().is_some());
        assert!(replay["rejected"][0].as_f64().unwrap() > 0.0);
    }
    method
}

/// Verify steps: the slot of the last committed token, tokens taken, and whether the next was rejected.
type Steps = Vec<(usize, usize, bool)>;

fn decoded(target: &Arc<Target<Cpu>>, method: &dyn Method<Kernels = Cpu>, ids: &[u32], from: usize) -> Steps {
    let weights = method.draft().unwrap();
    let tensors: DraftTensors =
        weights.tensors.iter().map(|t| (t.name.clone(), (t.shape.clone(), t.values.clone()))).collect();
    let config = DraftConfig::from_value(&weights.config).unwrap();
    let map = weights.vocab_map.clone();
    let draft =
        Draft::from_tensors(target.kernels().as_ref(), config, &tensors, map, PackMode::F32, "test").unwrap();
    let engine = Engine::new(Arc::clone(target), Some(drafter(target, draft).unwrap()));
    let options = GenerateOptions {
        max_new_tokens: ids.len() - from,
        draft: DraftPlan::Chain { depth: 4 },
        ..GenerateOptions::default()
    };
    let (mut steps, mut anchor, mut accepted) = (Steps::new(), None, 0);
    let done = engine.generate(&ids[..from], &options, &mut |event| {
        match event.origin {
            TokenOrigin::Draft => accepted += 1,
            TokenOrigin::Recovered | TokenOrigin::Bonus => {
                steps.push((anchor.unwrap(), accepted, event.origin == TokenOrigin::Recovered));
                accepted = 0;
            }
            TokenOrigin::Plain => {}
        }
        if event.origin != TokenOrigin::Draft {
            anchor = Some(event.position);
        }
        ControlFlow::Continue(())
    });
    assert_eq!(done.unwrap().token_ids, ids[from..], "the text is the target's");
    steps
}

#[track_caller]
fn check(kind: &str, layers: &[u32]) {
    let kernels = Arc::new(Cpu::new(2));
    let target = Arc::new(Target::load(kernels, &target_path(), Precision::F32).unwrap());
    let rows = rows(&target, layers);
    let mut method = trained(&target, kind, 0.4, layers, &rows);
    let (mut rejected, mut accepted) = (0, 0);
    for (number, row) in rows.iter().enumerate() {
        let mut pack = Pack::default();
        pack.push(number as u64, row, 128, method.feature_width(), method.last_width()).unwrap();
        let proposed = method.replays().unwrap().propose(&pack).unwrap();
        let steps = walk(&pack, &proposed);
        let from = steps[0].anchor as usize;
        assert!(from <= prompts()[number].len() + 1, "the walk begins with the answer");
        // Those that the end of the row cannot have cut.
        let whole = |anchor: usize| anchor + 4 + 2 < row.ids.len();
        let wanted: Steps =
            steps.iter().map(|s| (s.anchor as usize, s.accepted as usize, s.end != End::Open)).collect();
        let found = decoded(&target, method.as_ref(), &row.ids, from);
        let cut = |steps: &Steps| -> Steps { steps.iter().copied().filter(|s| whole(s.0)).collect() };
        // Training multiplies in another order than decoding, so of two tokens that are next to equal either may win.
        let (wanted_here, found_here) = (cut(&wanted), cut(&found));
        let missing = wanted_here.iter().filter(|step| !found_here.contains(step)).count();
        assert!(
            missing <= 1 + wanted_here.len() / 20,
            "{kind}, row {number}:\n{wanted_here:?}\n{found_here:?}"
        );
        assert!(wanted_here.len() > 8);
        rejected += wanted.iter().filter(|s| s.2).count();
        accepted += wanted.iter().map(|s| s.1).sum::<usize>();
    }
    assert!(rejected > 40 && accepted > 40, "{kind}: {rejected} rejected, {accepted} accepted");

    // And what is learnt from them changes the draft.
    let weights = |method: &dyn Method<Kernels = Cpu>| method.draft().unwrap().tensors;
    let without = trained(&target, kind, 0.0, layers, &rows);
    assert_ne!(weights(without.as_ref()), weights(method.as_ref()));
    let again = trained(&target, kind, 0.4, layers, &rows);
    assert!(weights(again.as_ref()) == weights(method.as_ref()), "{kind}: the same run, the same weights");
}

#[test]
fn rejections_of_eagle3_are_those_of_decoding() {
    check("eagle3", &[1, 4, 6]);
}

#[test]
fn rejections_of_dflash_are_those_of_decoding() {
    check("dflash", &[2, 6]);
}

#[test]
fn rejections_of_dspark_are_those_of_decoding() {
    check("dspark", &[2, 6]);
}

#[test]
fn rejections_of_p_eagle_are_those_of_decoding() {
    check("p-eagle", &[1, 4, 6]);
}

/// What the target chooses and how sure it is of everything come from the products of decoding, which give what its tensors in f32 do.
#[test]
fn the_targets_own_head_teaches_what_its_tensors_do() {
    let target = Arc::new(Target::load(Arc::new(Cpu::new(2)), &target_path(), Precision::F32).unwrap());
    for (kind, layers) in
        [("eagle3", &[1, 4, 6][..]), ("dflash", &[2, 6]), ("dspark", &[2, 6]), ("p-eagle", &[1, 4, 6])]
    {
        let (rows, file) = (rows(&target, layers), run_file(kind, 0.0));
        let asked = Arc::new(AtomicUsize::new(0));
        let counted: OwnHead = {
            let (asked, own) = (Arc::clone(&asked), own_head(&target));
            let width = target.config().hidden_size;
            Arc::new(move |states: &[f32]| {
                asked.fetch_add(states.len() / width, Ordering::Relaxed);
                own(states)
            })
        };
        let stats = [Some(counted), None].map(|own| {
            let mut method = untrained(&target, &file, layers, own);
            let mut pack = Pack::default();
            for (number, row) in rows.iter().take(3).enumerate() {
                pack.push(number as u64, row, 128, method.feature_width(), method.last_width()).unwrap();
            }
            let both = [Mode::Evaluate, Mode::Train].map(|mode| method.micro_batch(&pack, mode).unwrap());
            assert_eq!(both[0].depths, both[1].depths, "{kind}: known the second time");
            both[1].clone()
        });
        let trained: usize =
            rows.iter().take(3).map(|row| row.loss_mask.iter().filter(|m| **m).count()).sum();
        let times = asked.load(Ordering::Relaxed);
        // DFlash learns tokens alone.
        assert_eq!(times > 0, kind != "dflash");
        assert!(times <= trained, "{kind}: asked {times} times for {trained} tokens");
        let [own, tensors] = &stats;
        let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-4 * b.abs(), "{kind}: {a}, not {b}");
        close(own.loss, tensors.loss);
        for (own, tensors) in own.depths.iter().zip(&tensors.depths) {
            assert_eq!((own.trained, own.slots), (tensors.trained, tensors.slots), "{kind}");
            close(own.loss, tensors.loss);
            close(own.alpha, tensors.alpha);
        }
    }
}
