//! The mean of the best measured drafts, a candidate of its own at the end of a run.
//!
//! Every validated draft that is among the best `n` so far is kept in `candidates/`. After the last step the mean of the
//! best 2, of the best 3 and so on is measured like any other draft, and wins only by its accept length.

use std::path::{Path, PathBuf};

use draftsmith_formats::atomic;
use draftsmith_formats::safetensors_dir::SafetensorsDir;

use crate::checkpoint::{self, Best};
use crate::{DraftWeights, TrainError};

/// The best validated drafts of a run, on disk.
pub(crate) struct Candidates {
    root: PathBuf,
    /// How many are kept; below 2 none.
    limit: usize,
}

impl Candidates {
    pub(crate) fn new(run_dir: &Path, limit: usize) -> Candidates {
        Candidates { root: run_dir.join("candidates"), limit: if limit < 2 { 0 } else { limit } }
    }

    fn folder(&self, step: u64) -> PathBuf {
        self.root.join(checkpoint::folder_name(step))
    }

    /// Keeps a draft if it is among the best; `kept` is best first. Without a draft nothing is written: another process does.
    pub(crate) fn offer(
        &self,
        kept: &mut Vec<Best>,
        new: &Best,
        draft: Option<&DraftWeights>,
    ) -> Result<(), TrainError> {
        let at = kept.partition_point(|b| b.result.accept_len >= new.result.accept_len);
        if at >= self.limit {
            return Ok(());
        }
        if let Some(draft) = draft {
            draft.save(&self.folder(new.step))?;
        }
        kept.insert(at, new.clone());
        kept.truncate(self.limit);
        Ok(())
    }

    /// Removes what is no longer among the best. To be called when a checkpoint says so: until then an interrupted run
    /// may still ask for it.
    pub(crate) fn prune(&self, kept: &[Best]) -> Result<(), TrainError> {
        for (step, path) in checkpoint::list(&self.root) {
            if !kept.iter().any(|b| b.step == step) {
                atomic::remove_dir_all(path)?;
            }
        }
        Ok(())
    }

    /// The mean of kept drafts, rounded as it will be saved. `like` names the tensors.
    ///
    /// # Errors
    /// A candidate that is gone or has other shapes.
    pub(crate) fn mean(&self, of: &[Best], mut like: DraftWeights) -> Result<DraftWeights, TrainError> {
        let files: Vec<SafetensorsDir> =
            of.iter().map(|b| SafetensorsDir::open(self.folder(b.step))).collect::<Result<_, _>>()?;
        let share = 1.0 / of.len().max(1) as f32;
        for tensor in &mut like.tensors {
            tensor.values.fill(0.0);
            for file in &files {
                let stored = file.get(&tensor.name)?;
                stored.expect_shape(&tensor.shape)?;
                for (sum, value) in tensor.values.iter_mut().zip(stored.to_f32()?) {
                    *sum += share * value;
                }
            }
        }
        Ok(like.rounded())
    }
}
