//! `doctor --draft`: whether a draft fits its target, and if not, which setting of its folder is to blame.
//!
//! What can be told by looking comes first; then the draft is asked at the positions of a few texts as its folder says, and
//! under every setting that is known to be got wrong. One that does far better is a suspicion; it is then taken as
//! given, and the others are tried again beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_bench::record::DeviceInfo;
use draftsmith_bundle::{Imported, Manifest, Problem, has_manifest, layer_problem, number_problems};
use draftsmith_core::VocabMap;
use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_model::{DraftConfig, Published};
use serde::Serialize;
use serde_json::{Map, Value};

use super::folder::{self, Opened, Repaired};
use super::keys::Words;
use super::probes::{Facts, Probe, probes};
use super::score::{Measure, Scores, score};
use super::setting::{Copies, Feed, Setting, Source};
use super::texts::{Tap, Texts, interrupted};
use crate::Error;
use crate::backend::Backend;
use crate::engine::LoadedTarget;
use crate::target::tokenizer_of;

/// Causes that are looked for one after the other.
const ROUNDS: usize = 3;
/// Tokens of a proposal, for drafts that compute one after the other.
const CHAIN: usize = 4;
/// The same for drafts that compute all of them in one pass.
const BLOCK: usize = 8;
/// Texts that a setting is looked at on before it is given all of them.
const FIRST_TEXTS: usize = 3;
/// The same for one of many alike.
const FEW_TEXTS: usize = 2;
/// Mask tokens that are tried.
const MASKS: usize = 40;

/// Something about a draft that is probably wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Suspicion {
    /// Stable name.
    pub id: String,
    /// What is wrong, as a sentence.
    pub what: String,
    /// The key or tensor in the folder that it is about.
    pub key: String,
    /// What stands there, if it is a value.
    pub found: Option<String>,
    /// What to write in its place, or to do.
    pub write: String,
    /// How the draft does as it is; `None` if that was not measured.
    pub before: Option<Measure>,
    /// How it does with the correction.
    pub after: Option<Measure>,
    /// Other corrections that do as well.
    pub as_good: Vec<String>,
}

/// A setting that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// Stable name.
    pub id: String,
    /// The key or tensor.
    pub key: String,
    /// What would stand there.
    pub write: String,
    /// Beside how many corrections.
    pub round: usize,
    /// Its accept length; `None` if it does not fit the target.
    pub accept_len: Option<f64>,
    /// Positions that it was asked at.
    pub positions: usize,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct DraftReport {
    /// Where the draft lies.
    pub draft: PathBuf,
    /// The layout that was recognised.
    pub layout: Option<&'static str>,
    /// Its kind.
    pub kind: Option<&'static str>,
    /// The target.
    pub target: String,
    /// What it was asked on, if that is not the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceInfo>,
    /// How the draft does as its folder says; `None` if it cannot be asked.
    pub own: Option<Measure>,
    /// How it does with all corrections.
    pub corrected: Option<Measure>,
    /// What is probably wrong.
    pub suspicions: Vec<Suspicion>,
    /// What may be worth knowing, and is no reason against the draft.
    pub notes: Vec<String>,
    /// Settings that were tried.
    pub tried: Vec<Tried>,
}

impl DraftReport {
    /// True if nothing is suspected.
    pub fn is_well(&self) -> bool {
        self.suspicions.is_empty()
    }
}

/// A draft on the table.
pub struct Patient {
    path: PathBuf,
    raw: Map<String, Value>,
    opened: Opened,
}

/// A draft that can be asked, and what had to be corrected before.
struct Candidate {
    imported: Imported,
    repaired: Option<Suspicion>,
}

impl Patient {
    /// Reads a draft in any layout that can be imported, or one of our bundles.
    ///
    /// # Errors
    /// A path without a draft, a file that cannot be read, a kind that is not built.
    pub fn open(path: &Path) -> Result<Patient, Error> {
        let (raw, opened) = folder::open(path)?;
        Ok(Patient { path: path.to_owned(), raw, opened })
    }

    /// What can be told by looking.
    fn look<K: Backend>(&self, target: &LoadedTarget<K>) -> DraftReport {
        let imported = match &self.opened {
            Opened::Whole(imported) => Some(imported.as_ref()),
            Opened::Refused { repaired, .. } => repaired.first().map(|r| &r.imported),
        };
        let mut report = DraftReport {
            draft: self.path.clone(),
            layout: imported.map(|i| i.layout.name()),
            kind: imported.map(|i| i.config.name()),
            target: target.name(),
            device: target.target.kernels().device(),
            own: None,
            corrected: None,
            suspicions: Vec::new(),
            notes: Vec::new(),
            tried: Vec::new(),
        };
        if let Opened::Refused { problem, more, repaired } = &self.opened
            && repaired.is_empty()
        {
            report.suspicions.push(of_problem(problem));
            if *more > 0 {
                report.notes.push(format!("{more} more tensors or keys do not fit together"));
            }
        }
        if let Some(imported) = imported {
            self.look_at(imported, target, &mut report);
        }
        report
    }

    fn look_at<K: Backend>(&self, imported: &Imported, target: &LoadedTarget<K>, report: &mut DraftReport) {
        let config = &imported.config;
        let t = target.target.config();
        let words = Words::new(imported.layout, config, self.raw.clone());
        let found = |place: &str| words.found(place);
        report.suspicions.extend(number_problems(config, &imported.tensors).iter().map(of_problem));
        let shape = config.shape();
        if shape.target_hidden_size != t.hidden_size {
            let key = words.key(&["target_hidden_size", "hidden_size"], "target_hidden_size");
            let what = format!(
                "it reads states {} wide, the target's are {}",
                shape.target_hidden_size, t.hidden_size
            );
            let write = "nothing: it was made for another target".to_owned();
            report.suspicions.push(Suspicion::told("hidden_size", what, key, found, write));
        }
        if shape.vocab_size != t.vocab_size {
            let key = words.key(&["vocab_size"], "vocab_size");
            let what = format!("it counts {} token ids, the target has {}", shape.vocab_size, t.vocab_size);
            report.suspicions.push(Suspicion::told("vocab_size", what, key, found, t.vocab_size.to_string()));
        }
        if let DraftConfig::Block(block) = config
            && let Some(layers) = block.num_target_layers.filter(|n| *n != t.num_layers)
        {
            let key = words.key(&["num_target_layers"], "num_target_layers");
            let what = format!("it was made for a target of {layers} layers, this one has {}", t.num_layers);
            report.suspicions.push(Suspicion::told(
                "target_layers",
                what,
                key,
                found,
                t.num_layers.to_string(),
            ));
        }
        report.suspicions.extend(imported.borrowed_problems(&target.target).iter().map(|problem| {
            let write = "nothing: leave it out, if the draft does well with the target's".to_owned();
            Suspicion { write, ..of_problem(problem) }
        }));
        if let Some(difference) = self.tokenizer_difference(target, &mut report.notes) {
            let what = format!("its tokenizer is another one: {difference}");
            let write = "nothing: it was made for another target".to_owned();
            report.suspicions.push(Suspicion::told("tokenizer", what, "tokenizer".into(), found, write));
        }
        if let Some(manifest) = self.manifest()
            && manifest.target.weights_sha256 != target.sha256
        {
            report.notes.push("the bundle was trained beside other weights of its target than these".into());
        }
        if shape.max_position_embeddings < t.max_position {
            report.notes.push(format!(
                "it is meant for {} positions, the target's context is {}",
                shape.max_position_embeddings, t.max_position
            ));
        }
    }

    fn manifest(&self) -> Option<Manifest> {
        has_manifest(&self.path).then(|| Manifest::read(&self.path).ok()).flatten()
    }

    /// The first token that means something else in a tokenizer that came along.
    fn tokenizer_difference<K: Backend>(
        &self,
        target: &LoadedTarget<K>,
        notes: &mut Vec<String>,
    ) -> Option<String> {
        let file = match self.path.is_dir() {
            false => self.path.clone(),
            true if self.path.join("tokenizer.json").is_file() => self.path.clone(),
            true => {
                let entries = std::fs::read_dir(&self.path).ok()?;
                let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
                files.into_iter().find(|file| file.extension().is_some_and(|e| e == "gguf"))?
            }
        };
        match tokenizer_of(&file) {
            Ok(own) => {
                let difference = target.text.tokenizer.difference(&own)?;
                Some(difference.told("the target", "the draft"))
            }
            Err(error) => {
                notes.push(format!("its tokenizer was not compared: {error}"));
                None
            }
        }
    }

    /// True if it can be asked at all.
    pub fn can_be_asked(&self) -> bool {
        match &self.opened {
            Opened::Whole(_) => true,
            Opened::Refused { repaired, .. } => !repaired.is_empty(),
        }
    }

    /// Looks at the draft, asks it at the positions of the texts, and tries other settings.
    ///
    /// # Errors
    /// The wish to stop.
    pub fn examine<K: Backend>(
        &self,
        target: &LoadedTarget<K>,
        texts: &Texts,
        progress: &dyn Report,
        stop: &Stop,
    ) -> Result<DraftReport, Error> {
        let mut report = self.look(target);
        let candidates: Vec<Candidate> = match &self.opened {
            Opened::Whole(imported) => {
                vec![Candidate { imported: imported.as_ref().clone(), repaired: None }]
            }
            Opened::Refused { repaired, .. } => repaired.iter().map(Candidate::of).collect(),
        };
        let hopeless = report.suspicions.iter().any(|s| s.id == "hidden_size");
        if candidates.is_empty() || hopeless || texts.positions() == 0 {
            return Ok(report);
        }
        let mut best: Option<(Candidate, Setting, Copies, Option<Scores>)> = None;
        for candidate in candidates {
            let copies = Copies {
                embedding: candidate.imported.embedding.clone(),
                head: candidate.imported.head.clone(),
            };
            let Some(setting) = setting_of(&candidate.imported, target) else { continue };
            let own = score(&setting, &target.target, &copies, texts, depth(&setting.config));
            let own =
                own.map_err(|why| report.notes.push(format!("as it is it cannot be asked: {why}"))).ok();
            let is_better = match (&best, &own) {
                (None, _) => true,
                (Some((.., Some(was))), Some(own)) => own.beats(was),
                (Some((.., None)), own) => own.is_some(),
                (Some((.., Some(_))), None) => false,
            };
            if is_better {
                best = Some((candidate, setting, copies, own));
            }
        }
        let Some((candidate, mut setting, copies, own)) = best else { return Ok(report) };
        let deepest = depth(&setting.config);
        if let Some(mut suspicion) = candidate.repaired {
            suspicion.after = own.as_ref().map(Scores::measure);
            report.suspicions.insert(0, suspicion);
        } else {
            report.own = own.as_ref().map(Scores::measure);
        }
        let mut now = own.unwrap_or_else(|| Scores::nothing(texts, deepest));
        let mut is_asked = report.own.is_some() || report.suspicions.iter().any(|s| s.after.is_some());
        let problems = candidate.imported.borrowed_problems(&target.target);
        let is_other = |name: &str| {
            problems.iter().any(|p| matches!(p, Problem::OwnEmbedding { name: n, .. } if n == name))
        };
        let words = Words::new(candidate.imported.layout, &candidate.imported.config, self.raw.clone());
        let masks = mask_tokens(target);
        let contradiction = candidate.imported.contradiction();
        let facts = Facts {
            words: &words,
            target: target.target.config(),
            mask_tokens: &masks,
            copies: &copies,
            is_other_embedding: is_other("embed_tokens.weight"),
            is_other_head: is_other("lm_head.weight"),
            other_layers: contradiction.and_then(other_layers),
        };
        for round in 0..ROUNDS {
            let list = probes(&setting, &facts);
            progress.begin(&format!("settings, round {}", round + 1), Some(list.len() as u64), Unit::Steps);
            let mut better: Vec<(Probe, Scores)> = Vec::new();
            for (done, probe) in list.into_iter().enumerate() {
                if stop.requested() {
                    return Err(interrupted());
                }
                progress.detail(probe.id);
                let found = attempt(&probe, target, &copies, texts, &now);
                report.tried.push(Tried {
                    id: probe.id.to_owned(),
                    key: probe.key.clone(),
                    write: probe.write.clone(),
                    round,
                    accept_len: found.as_ref().ok().map(|s| s.measure().accept_len),
                    positions: found.as_ref().map_or(0, |s| s.accepted.iter().map(Vec::len).sum()),
                });
                if let Ok(scores) = found
                    && scores.accepted.len() == texts.texts.len()
                    && scores.is_far_better(&now)
                {
                    better.push((probe, scores));
                }
                progress.at(done as u64 + 1);
            }
            progress.end();
            let best =
                better.iter().map(|(_, s)| s).max_by(|a, b| a.mean(deepest).total_cmp(&b.mean(deepest)));
            let Some(best) = best.cloned() else { break };
            // The earliest that the best one does not beat is the plainest word for it.
            better.retain(|(_, scores)| !best.beats(scores));
            let Some(meant) = meant(&better, deepest) else { break };
            let (probe, scores) = better.remove(meant);
            let as_good = better.iter().map(|(p, _)| format!("`{}`: {}", p.key, p.write)).collect();
            // What was only told by looking is now measured.
            report.suspicions.retain(|s| s.id != probe.id || s.after.is_some());
            report.suspicions.push(Suspicion {
                id: probe.id.to_owned(),
                what: probe.what,
                found: words.found(&probe.key),
                key: probe.key,
                write: probe.write,
                before: is_asked.then(|| now.measure()),
                after: Some(scores.measure()),
                as_good,
            });
            (setting, now, is_asked) = (probe.setting, scores, true);
        }
        report.corrected = is_asked.then(|| now.measure());
        self.conclude(&mut report, &candidate.imported, target, &now);
        Ok(report)
    }

    /// What a measurement leaves to be said.
    fn conclude<K: Backend>(
        &self,
        report: &mut DraftReport,
        imported: &Imported,
        target: &LoadedTarget<K>,
        now: &Scores,
    ) {
        let layers = target.target.config().num_layers as u32;
        let told = report.suspicions.iter().any(|s| s.id.contains("layers"));
        let problem = imported.contradiction().cloned().or_else(|| layer_problem(&imported.config, layers));
        if let Some(problem) = problem.filter(|_| !told) {
            report.suspicions.push(of_problem(&problem));
        }
        if now.is_nothing() && report.suspicions.is_empty() {
            let what = "the target accepts next to nothing of it, and no other setting explains that";
            let write = "check that target, tokenizer and chat template are those that it was trained for, and that it was \
                         trained at all";
            let (id, key) = ("accepts_nothing", "the draft as a whole");
            report.suspicions.push(Suspicion::told(id, what.into(), key.into(), |_| None, write.into()));
        }
    }
}

impl Candidate {
    fn of(repaired: &Repaired) -> Candidate {
        let Repaired { id, what, key, found, write, imported } = repaired;
        let suspicion = Suspicion {
            id: (*id).to_owned(),
            what: what.clone(),
            key: key.clone(),
            found: found.clone(),
            write: write.clone(),
            before: None,
            after: None,
            as_good: Vec::new(),
        };
        Candidate { imported: imported.clone(), repaired: Some(suspicion) }
    }
}

impl Suspicion {
    /// What was told by looking.
    fn told(
        id: &str,
        what: String,
        key: String,
        found: impl Fn(&str) -> Option<String>,
        write: String,
    ) -> Suspicion {
        let found = found(&key);
        let id = id.to_owned();
        Suspicion { id, what, key, found, write, before: None, after: None, as_good: Vec::new() }
    }
}

/// A problem of the importer's as a suspicion.
fn of_problem(problem: &Problem) -> Suspicion {
    let key = match problem {
        Problem::TensorMissing { name, .. }
        | Problem::TensorExtra { name, .. }
        | Problem::TensorTwice { name, .. }
        | Problem::TensorShape { name, .. }
        | Problem::TensorDtype { name, .. }
        | Problem::TensorNotFinite { name, .. }
        | Problem::TensorConstant { name, .. }
        | Problem::RopeDivisors { name }
        | Problem::OwnEmbedding { name, .. } => name.clone(),
        Problem::VocabMap { .. } => "d2t".to_owned(),
        Problem::LayersDisagree { keys, .. } => keys.join(", "),
        Problem::LayerOutside { .. } | Problem::LayerOrder { .. } => "the captured layers".to_owned(),
        Problem::Untrained { .. } => "all weights".to_owned(),
        _ => "config.json".to_owned(),
    };
    let write =
        problem.hint().unwrap_or_else(|| "take the draft from where it was published again".to_owned());
    Suspicion::told(problem.kind(), problem.to_string(), key, |_| None, write)
}

/// Layers (0-based) of the key that is not believed.
fn other_layers(problem: &Problem) -> Option<Vec<u32>> {
    match problem {
        Problem::LayersDisagree { read_by, .. } => {
            read_by.iter().map(|id| u32::try_from(id.checked_sub(1)?).ok()).collect()
        }
        _ => None,
    }
}

fn depth(config: &DraftConfig) -> usize {
    match config.published() {
        Published::Eagle3(_) | Published::Nowhere => CHAIN,
        Published::Block(_) | Published::PEagle(_) => BLOCK,
    }
}

/// A probe's scores: of all texts if it looks promising on the first, else of these alone.
fn attempt<K: Backend>(
    probe: &Probe,
    target: &LoadedTarget<K>,
    copies: &Copies,
    texts: &Texts,
    now: &Scores,
) -> Result<Scores, String> {
    let wanted = depth(&probe.setting.config);
    let few = if probe.is_one_of_many { FEW_TEXTS } else { FIRST_TEXTS };
    if few < texts.texts.len() {
        let first = score(&probe.setting, &target.target, copies, &texts.first(few), wanted)?;
        if !first.is_promising(&now.first(few)) {
            return Ok(first);
        }
    }
    score(&probe.setting, &target.target, copies, texts, wanted)
}

/// Which of the settings that do equally well is meant: the first; of many of its kind the best.
fn meant(better: &[(Probe, Scores)], depth: usize) -> Option<usize> {
    let first = &better.first()?.0;
    let alike = |at: &usize| better[*at].0.id == first.id;
    match first.is_one_of_many {
        false => Some(0),
        true => (0..better.len())
            .filter(alike)
            .max_by(|a, b| better[*a].1.mean(depth).total_cmp(&better[*b].1.mean(depth))),
    }
}

/// Tokens that may stand for those to be proposed: what the tokenizer calls a mask, its other special tokens, and ids that
/// it does not use.
fn mask_tokens<K: Backend>(target: &LoadedTarget<K>) -> Vec<u32> {
    let tokenizer = &target.text.tokenizer;
    let vocab = target.target.config().vocab_size as u32;
    let special = tokenizer.special_ids();
    let is_mask =
        |id: &&u32| String::from_utf8_lossy(tokenizer.token_to_piece(**id)).to_lowercase().contains("mask");
    let unused = (0..vocab).filter(|id| tokenizer.token_to_piece(*id).is_empty()).take(4);
    let mut ids: Vec<u32> = special.iter().filter(is_mask).copied().collect();
    ids.extend([vocab - 1, 0].into_iter().chain(unused).chain(special.iter().copied()));
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|id| *id < vocab && seen.insert(*id));
    ids.truncate(MASKS);
    ids
}

/// The setting that a folder asks for, made to fit the target's vocabulary. `None` if it cannot be.
fn setting_of<K: Backend>(imported: &Imported, target: &LoadedTarget<K>) -> Option<Setting> {
    let t = target.target.config();
    let mut config = imported.config.clone();
    let mut tensors = imported.tensors.clone();
    let mut vocab_map = imported.vocab_map.clone();
    if config.shape().vocab_size != t.vocab_size {
        vocab_map = fit_vocabulary(&mut config, &mut tensors, vocab_map.as_ref(), t.vocab_size)?;
    }
    let taps = imported.config.layers(t.num_layers as u32).into_iter().map(Tap::Layer).collect();
    Some(Setting {
        config,
        tensors: Arc::new(tensors),
        weights: Vec::new(),
        vocab_map,
        taps,
        feed: Feed::Next,
        embedding: Source::Target,
        embed_scale: None,
        head: Source::Target,
        rope_gap: 0,
    })
}

/// Cuts and pads a draft to another vocabulary: ids that the target does not have are never proposed.
fn fit_vocabulary(
    config: &mut DraftConfig,
    tensors: &mut draftsmith_model::DraftTensors,
    map: Option<&VocabMap>,
    vocab: usize,
) -> Option<Option<VocabMap>> {
    let shape = config.shape();
    let ids: Vec<u32> = match map {
        Some(map) => map.target_ids().to_vec(),
        None => (0..shape.vocab_size as u32).collect(),
    };
    let kept: Vec<usize> = (0..ids.len()).filter(|draft| (ids[*draft] as usize) < vocab).collect();
    for name in ["lm_head.weight", "markov_head.markov_w2.weight"] {
        if let Some((shape, values)) = tensors.get_mut(name) {
            let width = shape[1];
            *values = kept.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect();
            shape[0] = kept.len();
        }
    }
    for name in ["embed_tokens.weight", "markov_head.markov_w1.weight"] {
        if let Some((shape, values)) = tensors.get_mut(name) {
            values.resize(vocab * shape[1], 0.0);
            shape[0] = vocab;
        }
    }
    let numbers = config.numbers()?;
    (*numbers.vocab_size, *numbers.draft_vocab_size) = (vocab, kept.len());
    config.check().ok()?;
    let kept: Vec<u32> = kept.iter().map(|draft| ids[*draft]).collect();
    Some(Some(VocabMap::from_target_ids(&kept, vocab).ok()?))
}
