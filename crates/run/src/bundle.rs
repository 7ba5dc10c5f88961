//! Stage `bundle`: the chosen draft with everything that proves what it is.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use draftsmith_bundle::{
    BegunWith, DataInfo, Existing, MakeInput, MeasuredResult, Recommended, TargetInfo, TrainingInfo,
    make_with_target,
};
use draftsmith_formats::hash::sha256_hex;
use draftsmith_formats::run::Stage;
use draftsmith_pull::Reference;
use serde_json::{Value, json};

use super::Run;
use crate::Error;
use crate::license::{hub_name, license_text, target_license};

impl Run<'_> {
    pub(super) fn bundle(&self, dir: &Path, key: &str) -> Result<Value, Error> {
        self.make_bundle(dir, key, Vec::new(), None)
    }

    /// Makes (or replaces) the bundle; with results once there are some, their page and the verdict.
    pub(super) fn make_bundle(
        &self,
        dir: &Path,
        key: &str,
        results: Vec<MeasuredResult>,
        judged: Option<(String, String)>,
    ) -> Result<Value, Error> {
        let (report_html, verdict) = judged.unzip();
        let summary = |stage| -> Result<Value, Error> {
            Ok(self.folder.read(stage)?.map_or(Value::Null, |file| file.summary))
        };
        let trained = summary(Stage::Train)?;
        let data = summary(Stage::Data)?;
        let tokens = if self.file.regenerate.enabled { summary(Stage::Regenerate)? } else { data.clone() };
        let target = self.target()?;
        let depth = self.file.bench.depth;
        let because = match trained["accept_len"].as_f64() {
            Some(accept_len) => {
                format!(
                    "for engines with a fixed depth; accept length {accept_len:.2} at depth {} on held-out prompts",
                    self.file.validate.depth
                )
            }
            None => "the depth of the run file; nothing was measured".to_string(),
        };
        let license = self.file.bundle.license.clone().unwrap_or_default();
        let draft_dir = self.folder.stage_dir(Stage::Train).join(trained["draft"].as_str().unwrap_or("last"));
        let run_toml = self.file.to_toml();
        let strings = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect()
        };
        let sources: Vec<String> = self.sources_as_written();
        let input = MakeInput {
            out: dir.to_path_buf(),
            existing: Existing::Replace,
            checkpoint: draft_dir,
            weights: self.file.bundle.weights,
            name: self.file.bundle.name.clone().unwrap_or_else(|| self.file.run.name.clone()),
            target: TargetInfo {
                name: self
                    .target_references()
                    .iter()
                    .find_map(|r| file_on_hub(r))
                    .unwrap_or_else(|| target.name()),
                references: self.target_references(),
                license: match &self.file.bundle.base_license {
                    Some(license) => license.clone(),
                    None => target_license(&target.path),
                },
                hub_name: hub_name(self.file.bundle.base_model.as_deref(), &self.file.target.source.0)?,
                ..target.info()
            },
            training: TrainingInfo {
                data: vec![DataInfo {
                    name: sources.join(", "),
                    sha256: Some(tokens["tokens_sha256"].as_str().unwrap_or_default().to_string()),
                    licenses: strings(&data["licenses"]),
                    rows: tokens["token_rows"].as_u64().unwrap_or(0),
                    tokens: tokens["tokens"].as_u64().unwrap_or(0),
                    trained_tokens: tokens["trained_tokens"].as_u64().unwrap_or(0),
                }],
                on_policy: self.file.regenerate.enabled,
                steps: trained["draft_step"].as_u64().unwrap_or(0),
                tokens_read: trained["slots"].as_u64().unwrap_or(0),
                ttt_length: self.file.unrolled_steps(),
                begun_with: self.begun.as_ref().map(|begun| BegunWith {
                    name: begun.name.clone(),
                    weights_sha256: begun.sha256.clone(),
                }),
                lr_peak: self.file.train.lr,
                seed: self.file.train.seed.unwrap_or(self.file.run.seed),
                chosen_by: match self.file.validate.every {
                    0 => "the last step".to_string(),
                    _ => match trained["draft_mean_of"].as_array().map_or(0, Vec::len) {
                        0 => "measured accept length on held-out prompts".to_string(),
                        count => format!(
                            "measured accept length on held-out prompts (it is the mean of the best {count} drafts)"
                        ),
                    },
                },
                wall_s: self.folder.read(Stage::Train)?.map(|file| file.seconds),
                run_sha256: sha256_hex(run_toml.as_bytes()),
            },
            imported: None,
            license_text: license_text(&license),
            notice: self.notice(&strings(&data["origins"]), &strings(&data["licenses"])),
            license,
            recommended: Recommended {
                verdict,
                ..Recommended::measured(&results).unwrap_or_else(|| Recommended {
                    // Without a single accepted draft nothing can be gained.
                    pays: trained["accept_len"].as_f64().is_none_or(|accept_len| accept_len > 1.0),
                    ..Recommended::chain(depth, because)
                })
            },
            results,
            run_toml,
            report_html,
            probe_inputs: Vec::new(),
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        };
        let made = make_with_target(&input, &target.target)?;
        for warning in &made.warnings {
            self.env.report.note(&format!("bundle: {warning}"));
        }
        Ok(json!({ "path": self.in_folder(&made.path), "bytes": made.bytes, "made_from": key }))
    }

    /// References that lead to the very weights that were trained for, the one that answered first. Others lead there
    /// for certain only if the run file pins the hash.
    fn target_references(&self) -> Vec<String> {
        let answered = &self.inputs.target_reference;
        let others = self.file.target.source.0.iter().filter(|other| *other != answered);
        let pinned = self.file.target.sha256.is_some();
        std::iter::once(answered)
            .chain(others.filter(|_| pinned))
            .map(|name| self.file.as_written(name))
            .collect()
    }

    fn sources_as_written(&self) -> Vec<String> {
        self.file.data.sources.iter().map(|source| self.file.as_written(&source.path)).collect()
    }

    fn notice(&self, origins: &[String], licenses: &[String]) -> String {
        let mut text = format!(
            "Draft for {}, trained by draftsmith.\n\nTraining data: {}.\n",
            self.inputs.target_path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
            self.sources_as_written().join(", ")
        );
        if !origins.is_empty() {
            text.push_str(&format!("Rows come from: {}.\n", origins.join(", ")));
        }
        if !licenses.is_empty() {
            text.push_str(&format!("Licences of the rows: {}.\n", licenses.join(", ")));
        }
        if self.file.regenerate.enabled {
            text.push_str("Answers were written by the target itself.\n");
        }
        text
    }
}

/// What a model is called by its file on the hub, whatever a mirror calls it.
fn file_on_hub(reference: &str) -> Option<String> {
    match reference.parse() {
        Ok(Reference::Hf { file: Some(file), .. }) => {
            Path::new(&file).file_stem().map(|stem| stem.to_string_lossy().into_owned())
        }
        _ => None,
    }
}
