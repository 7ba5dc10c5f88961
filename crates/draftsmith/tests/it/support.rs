//! Runs the binary in a folder of its own, with nothing of this machine's environment but PATH.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use draftsmith::engine::{LoadedTarget, TargetOptions};
use draftsmith::model::Precision;
use draftsmith::pull::Places;
use draftsmith::report::{Silent, Stop};

/// The repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the crate lies in the repository")
}

/// The target that ships in the fixtures.
pub(crate) fn tiny_target() -> LoadedTarget {
    let source = [repository().join("fixtures/tiny-target").display().to_string()];
    let options = TargetOptions {
        sources: &source,
        sha256: None,
        precision: Precision::Stored,
        threads: 1,
        template: None,
    };
    LoadedTarget::load(&options, &Places::from_vars(|_| None), &Silent, &Stop::default()).unwrap()
}

/// A folder that is home, cache and working directory at once, and the commands run in it.
pub(crate) struct Home {
    folder: tempfile::TempDir,
    vars: Vec<(String, String)>,
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Home {
    pub(crate) fn new() -> Home {
        Home { folder: tempfile::tempdir().unwrap(), vars: Vec::new() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Sets a variable for all later commands.
    pub(crate) fn set(&mut self, name: &str, value: impl ToString) -> &mut Home {
        self.vars.push((name.to_string(), value.to_string()));
        self
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_draftsmith"));
        command
            .args(args)
            .current_dir(self.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .envs(self.vars.iter().map(|(n, v)| (n, v)))
            .stdin(Stdio::null());
        command
    }

    /// Starts a command in the repository, its output kept for whoever waits for it.
    pub(crate) fn spawn(&self, args: &[String]) -> Child {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.command(&args)
            .current_dir(repository())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        Ended::from(self.command(args).output().unwrap())
    }

    /// The snapshot text of a command: paths of this run and of the repository are named, not shown.
    pub(crate) fn snapshot(&self, args: &[&str]) -> String {
        let ended = self.run(args);
        let clean = |text: &str| {
            let mut text = text.to_string();
            for (path, name) in [(self.path().to_path_buf(), "[HOME]"), (repository(), "[REPO]")] {
                let real = path.canonicalize().unwrap_or(path.clone());
                text = text
                    .replace(&real.display().to_string(), name)
                    .replace(&path.display().to_string(), name);
            }
            text
        };
        format!(
            "$ draftsmith {}\nexit: {}\n--- stdout\n{}--- stderr\n{}",
            clean(&args.join(" ")),
            ended.code.map(|c| c.to_string()).unwrap_or_else(|| "killed".to_string()),
            clean(&ended.stdout),
            clean(&ended.stderr)
        )
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ended {
    /// The parsed stdout of a command that ended well.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "stderr:\n{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {}", self.stdout))
    }
}
