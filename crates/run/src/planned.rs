//! What a run was planned to take, held against what it took: the bill from before its first stage is kept in its folder.

use std::path::PathBuf;

use draftsmith_formats::atomic;
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::run::Stage;
use serde::{Deserialize, Serialize};

use crate::aside::bytes_below;
use crate::measure::peak_memory_bytes;
use crate::plan::{Plan, StagePlan, StageState};
use crate::state::{RunFolder, StateError, read_json};
use crate::{Error, Run, StageDone};

/// `state/planned.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Planned {
    /// Hash of the run file that was planned, as it lies in the folder.
    run_sha256: String,
    /// Its stages in order.
    pub stages: Vec<PlannedStage>,
    /// Most memory of a stage.
    pub memory_bytes: Option<u64>,
}

/// What a stage was planned to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedStage {
    /// Its word.
    pub stage: Stage,
    /// Seconds; `None` where nobody could know.
    pub seconds: Option<f64>,
    /// Bytes on disk when it is done.
    pub disk_bytes: u64,
}

impl Planned {
    fn path(folder: &RunFolder) -> PathBuf {
        folder.state_dir().join("planned.json")
    }

    /// The bill that was kept of the run file there; `None` if there is none, or the run file was changed since.
    ///
    /// # Errors
    /// [`StateError::BadBill`] if it cannot be read.
    pub fn of(folder: &RunFolder) -> Result<Option<Planned>, StateError> {
        let bad = |path, reason| StateError::BadBill { path, reason };
        let Some(planned) = read_json::<Planned>(Planned::path(folder), bad)? else { return Ok(None) };
        let now = sha256_file(folder.run_file())?;
        Ok(Some(planned).filter(|planned| planned.run_sha256 == now))
    }

    /// Seconds of a stage.
    pub fn seconds(&self, stage: Stage) -> Option<f64> {
        self.stages.iter().find(|planned| planned.stage == stage)?.seconds
    }
}

/// What a run was planned to take, and took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    /// Its stages in order.
    pub stages: Vec<HeldStage>,
    /// Seconds of all stages that were planned.
    pub planned_seconds: f64,
    /// Seconds that those took, interrupted attempts included.
    pub seconds: f64,
    /// Bytes on disk that were planned.
    pub planned_disk_bytes: u64,
    /// Bytes that are there.
    pub disk_bytes: u64,
    /// Most memory that was planned.
    pub planned_memory_bytes: Option<u64>,
    /// Most memory that this process held; `None` if others did some of the work, or the system does not say.
    pub memory_bytes: Option<u64>,
}

/// What a stage was planned to take, and took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldStage {
    /// Its word.
    pub stage: Stage,
    /// Seconds that were planned.
    pub planned_seconds: Option<f64>,
    /// Seconds that it took.
    pub seconds: f64,
    /// Bytes on disk that were planned.
    pub planned_disk_bytes: u64,
    /// Bytes that are there.
    pub disk_bytes: u64,
}

impl Run<'_> {
    /// Keeps the bill of a run that is open and has not begun. Of a run under way a bill says what is left, and the first one is kept.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn keep(&self, plan: &Plan) -> Result<(), Error> {
        if plan.stages.iter().any(|stage| stage.state != StageState::Waiting) {
            return Ok(());
        }
        let of = |stage: &StagePlan| PlannedStage {
            stage: stage.stage,
            seconds: stage.seconds,
            disk_bytes: stage.disk_bytes,
        };
        let planned = Planned {
            run_sha256: sha256_file(self.folder.run_file()).map_err(StateError::from)?,
            stages: plan.stages.iter().map(of).collect(),
            memory_bytes: plan.memory_bytes,
        };
        let text = serde_json::to_vec_pretty(&planned).expect("a bill holds only what JSON can say");
        Ok(atomic::write(Planned::path(&self.folder), text).map_err(StateError::from)?)
    }

    /// The bill that was kept of this run beside what its finished stages took; `None` if there is none.
    ///
    /// # Errors
    /// Those of the folder.
    pub fn held(&self, done: &[StageDone]) -> Result<Option<Held>, Error> {
        let Some(planned) = Planned::of(&self.folder)? else { return Ok(None) };
        let all_here = done.iter().all(|done| !done.before);
        let taken =
            |done: &StageDone| (done.stage, done.file.seconds, bytes_below(&self.made_by(done.stage)));
        let taken: Vec<(Stage, f64, u64)> = done.iter().map(taken).collect();
        Ok(Some(hold(&planned, &taken, peak_memory_bytes().filter(|_| all_here))))
    }
}

/// Stages that are done with their seconds and bytes, beside what was planned of them.
fn hold(planned: &Planned, taken: &[(Stage, f64, u64)], memory_bytes: Option<u64>) -> Held {
    let stages: Vec<HeldStage> = taken
        .iter()
        .filter_map(|(stage, seconds, disk_bytes)| {
            let planned = planned.stages.iter().find(|planned| planned.stage == *stage)?;
            Some(HeldStage {
                stage: *stage,
                planned_seconds: planned.seconds,
                seconds: *seconds,
                planned_disk_bytes: planned.disk_bytes,
                disk_bytes: *disk_bytes,
            })
        })
        .collect();
    // What nobody could know beforehand is no part of either sum.
    let timed = || stages.iter().filter_map(|stage| Some((stage.planned_seconds?, stage.seconds)));
    Held {
        planned_seconds: timed().map(|(planned, _)| planned).sum(),
        seconds: timed().map(|(_, seconds)| seconds).sum(),
        planned_disk_bytes: stages.iter().map(|stage| stage.planned_disk_bytes).sum(),
        disk_bytes: stages.iter().map(|stage| stage.disk_bytes).sum(),
        planned_memory_bytes: planned.memory_bytes,
        memory_bytes,
        stages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_planned_and_is_done_is_held_against_the_bill() {
        let stage = |stage, seconds, disk_bytes| PlannedStage { stage, seconds, disk_bytes };
        let planned = Planned {
            run_sha256: "h".to_string(),
            stages: vec![
                stage(Stage::Data, None, 10),
                stage(Stage::Regenerate, Some(60.0), 200),
                stage(Stage::Train, Some(100.0), 3000),
            ],
            memory_bytes: Some(7),
        };
        let taken = [(Stage::Data, 5.0, 12), (Stage::Regenerate, 75.0, 210), (Stage::Bench, 9.0, 1)];
        let held = hold(&planned, &taken, None);
        assert_eq!(held.stages.iter().map(|s| s.stage).collect::<Vec<_>>(), [Stage::Data, Stage::Regenerate]);
        assert_eq!((held.planned_seconds, held.seconds), (60.0, 75.0));
        assert_eq!((held.planned_disk_bytes, held.disk_bytes), (210, 222));
        assert_eq!((held.planned_memory_bytes, held.memory_bytes), (Some(7), None));
        assert_eq!(planned.seconds(Stage::Regenerate), Some(60.0));
        assert_eq!(planned.seconds(Stage::Data), None);
    }

    #[test]
    fn a_bill_is_told_of_the_run_file_that_it_was_made_of_and_a_broken_one_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        assert_eq!(Planned::of(&folder).unwrap(), None);
        std::fs::write(folder.run_file(), "a = 1\n").unwrap();
        std::fs::create_dir(folder.state_dir()).unwrap();
        let run_sha256 = sha256_file(folder.run_file()).unwrap();
        let planned = Planned { run_sha256, stages: Vec::new(), memory_bytes: None };
        std::fs::write(Planned::path(&folder), serde_json::to_vec(&planned).unwrap()).unwrap();
        assert_eq!(Planned::of(&folder).unwrap(), Some(planned));
        std::fs::write(folder.run_file(), "a = 2\n").unwrap();
        assert_eq!(Planned::of(&folder).unwrap(), None);
        std::fs::write(Planned::path(&folder), "{}").unwrap();
        let error = Planned::of(&folder).unwrap_err();
        assert!(
            error.to_string().contains("planned.json` is not the bill of a run: missing field"),
            "{error}"
        );
        assert!(error.hint().unwrap().starts_with("remove `"), "{:?}", error.hint());
    }
}
