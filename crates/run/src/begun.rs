//! `draft.from`: training that begins with the weights of a draft that is there, for data that it has not seen.
//!
//! Kind, sizes, vocabulary and captured layers are those of the draft. Its bundle says by its own run file what `[draft]` was; a
//! draft without one has the keys of this run file. Either way the network that comes of them must be the draft's, or nothing begins.

use std::path::{Path, PathBuf};

use draftsmith_bundle::{Manifest, WEIGHTS_FILE, has_manifest};
use draftsmith_core::VocabMap;
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::run::{RunFile, SetOtherwise, is_bundle_name};
use draftsmith_model::{DraftConfig, DraftTensors, TargetConfig, read_draft, read_draft_config};
use draftsmith_train::TrainError;
use serde_json::Value;

use crate::Error;
use crate::engine::{LoadedTarget, belongs, draft_name};
use crate::shelf::Shelf;

/// The key.
const KEY: &str = "draft.from";

/// A draft that training begins with.
#[derive(Debug)]
pub(crate) struct Begun {
    dir: PathBuf,
    /// As its bundle calls it, or else its folder.
    pub(crate) name: String,
    /// Of its weights.
    pub(crate) sha256: String,
    manifest: Option<Manifest>,
}

impl Begun {
    /// The draft that a run file names; `[draft]` and `capture.layers` become its own. `None` if it names none.
    ///
    /// # Errors
    /// A draft that is not there or cannot be read, keys that are set otherwise, and a network that is not the draft's for this
    /// target.
    pub(crate) fn find(
        file: &mut RunFile,
        target: &TargetConfig,
        shelf: Shelf<'_>,
    ) -> Result<Option<Begun>, Error> {
        let Some(written) = file.draft.from.clone() else { return Ok(None) };
        let dir = match is_bundle_name(&written) {
            false => shelf.bundle(Path::new(&written))?,
            true => shelf.named(&written).map_err(|error| {
                let is_below = |from: &Path| from.join(&written).is_dir();
                match is_below(file.paths_from()) || is_below(Path::new("")) {
                    true => Error::input(
                        format!("no bundle is called `{written}`"),
                        format!("for the folder of that name write `./{written}`"),
                    ),
                    false => error,
                }
            })?,
        };
        let real = |path: &Path| path.canonicalize().ok();
        if real(&dir).is_some_and(|dir| Some(dir) == real(&file.bundle_dir())) {
            return Err(Error::input(
                format!("`{written}` is the bundle that this very run makes"),
                "give the new run a `run.name` or a `run.dir` of its own",
            ));
        }
        let config = read_draft_config(&dir)?;
        let manifest = has_manifest(&dir).then(|| Manifest::read(&dir)).transpose()?;
        let name = draft_name(&dir, manifest.as_ref());
        let drafts_for = [
            Some(("tokens", config.shape().vocab_size, target.vocab_size)),
            manifest.as_ref().map(|m| ("width", m.target.hidden_size as usize, target.hidden_size)),
            manifest.as_ref().map(|m| ("layers", m.target.num_layers as usize, target.num_layers)),
        ];
        if let Some((what, its, found)) =
            drafts_for.into_iter().flatten().find(|(_, its, found)| its != found)
        {
            return Err(Error::input(
                format!("draft `{name}` is for another target: {what} {its}, and this one has {found}"),
                "name a draft for this target; `draftsmith list` says what bundles are for",
            ));
        }
        if let Ok(before) = RunFile::load_saved(dir.join("run.toml"), &[]) {
            file.draft.begin_with(&before.draft).map_err(|SetOtherwise { key, set, own }| {
                set_otherwise(&key, &set, &name, own.as_deref().unwrap_or("the target's"))
            })?;
        }
        let shape = config.shape();
        file.draft.vocab_size = shape.draft_vocab_size as u32;
        let layers = config.layers(target.num_layers as u32);
        match &file.capture.layers {
            Some(set) if *set != layers => {
                return Err(set_otherwise(
                    "capture.layers",
                    &format!("{set:?}"),
                    &name,
                    &format!("{layers:?}"),
                ));
            }
            _ => file.capture.layers = Some(layers.clone()),
        }
        let (kind, asked) = (config.name(), file.draft.method.name());
        if kind != asked {
            return Err(Error::input(
                format!("draft `{name}` is of kind `{kind}`, and `draft.method` is `{asked}`"),
                format!(
                    "write `draft.method = \"{kind}\"`; what its bundle does not say stands in `[draft]`"
                ),
            ));
        }
        let other = |difference: String| {
            Error::input(
                format!("draft `{name}` is another network than this run would train: {difference}"),
                "name a draft for this target; what its bundle does not say stands in `[draft]`",
            )
        };
        let made = DraftConfig::from_table(&file.draft, target, shape.draft_vocab_size);
        let mut made = made.map_err(|error| other(error.to_string()))?;
        made.set_target_layers(&layers).map_err(|error| other(error.to_string()))?;
        if let Some(difference) = difference(made, config)? {
            return Err(other(difference));
        }
        let sha256 = sha256_file(dir.join(WEIGHTS_FILE))?;
        Ok(Some(Begun { dir, name, sha256, manifest }))
    }

    /// The target is that of the draft.
    ///
    /// # Errors
    /// What differs.
    pub(crate) fn check_target(&self, target: &LoadedTarget) -> Result<(), Error> {
        self.manifest.as_ref().map_or(Ok(()), |manifest| belongs(&self.dir, manifest, target))
    }

    /// Its weights and its vocabulary.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(crate) fn load(&self) -> Result<(DraftTensors, VocabMap), Error> {
        let (config, tensors, vocab_map) = read_draft(&self.dir)?;
        Ok((tensors, vocab_map.unwrap_or_else(|| VocabMap::identity(config.shape().vocab_size))))
    }
}

fn set_otherwise(key: &str, set: &str, name: &str, own: &str) -> Error {
    Error::input(
        format!("`{key}` is {set}, and draft `{name}`, which `{KEY}` names, has {own}"),
        format!("leave `{key}` out, or `{KEY}`"),
    )
}

/// The first key in which two networks differ, tokens with a meaning of their own left aside.
fn difference(mut made: DraftConfig, mut own: DraftConfig) -> Result<Option<String>, TrainError> {
    for config in [&mut made, &mut own] {
        config.set_token_ids(None, &[], None);
        config.set_mask_token(0);
    }
    if made == own {
        return Ok(None);
    }
    let (made, own) = (made.to_value()?, own.to_value()?);
    let keys = own.as_object().into_iter().chain(made.as_object()).flat_map(|object| object.keys());
    let shown = |value: &Value| if value.is_null() { "nothing".to_owned() } else { value.to_string() };
    let differs = keys.map(|key| (key, &made[key], &own[key])).find(|(_, made, own)| made != own);
    Ok(Some(match differs {
        Some((key, made, own)) => {
            format!("its `config.json` has {} for `{key}`, the run {}", shown(own), shown(made))
        }
        None => "their configurations differ".to_owned(),
    }))
}
