//! One module per verb: resolve the arguments, call the library, print the result.

pub(crate) mod bench;
pub(crate) mod bench_compare;
pub(crate) mod bench_decode;
pub(crate) mod bench_identity;
pub(crate) mod bench_train;
pub(crate) mod bench_tune;
pub(crate) mod bundle;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod doctor_draft;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod make;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod quickstart;
pub(crate) mod serve;
pub(crate) mod serve_gap;
mod served_runs;
pub(crate) mod shell;
pub(crate) mod stages;
pub(crate) mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use draftsmith::Error;
use draftsmith::cli::{BundleVerb, Cli, DataVerb, Verb};
use draftsmith::device::{Around, Backend, Compute, Host, Work};
use draftsmith::engine::{
    LoadedDraft, LoadedTarget, TargetOptions, default_threads, load_draft, load_small, target_references,
    weights_warning,
};
use draftsmith::formats::run::Device;
use draftsmith::kernels::PackMode;
use draftsmith::model::Precision;
use draftsmith::pull::Places;
use draftsmith::report::{Report, Stop};
use draftsmith::run::{Env, Launch, Ranks};
use draftsmith::shelf::Shelf;

use crate::failure::Failure;
use crate::printer::Printer;
use crate::signals;

/// What every verb needs.
pub(crate) struct Session {
    pub(crate) places: Places,
    pub(crate) printer: Printer,
    pub(crate) stop: Stop,
    /// Folders that may hold what ships with draftsmith, in order.
    pub(crate) roots: Vec<PathBuf>,
    /// Set by SIGHUP while `serve` runs.
    pub(crate) reload: Arc<AtomicBool>,
    /// The processes that a launcher started; for verbs that do not work together this one alone.
    pub(crate) ranks: Ranks,
}

/// What a verb does with the other processes of a launcher.
enum Together {
    /// Works with them.
    Joins,
    /// They would be in each other's way.
    Refuses(&'static str),
    /// Each does the same for itself.
    Apart,
}

fn together(verb: &Verb) -> Together {
    match verb {
        Verb::Run(args) if args.plan => Together::Refuses("run --plan"),
        Verb::Capture(args) if args.plan => Together::Refuses("capture --plan"),
        Verb::Data(args) if !matches!(args.verb, DataVerb::Prepare(_)) => Together::Apart,
        Verb::Bundle(args) if !matches!(args.verb, BundleVerb::Make(_)) => Together::Apart,
        Verb::Run(_)
        | Verb::Data(_)
        | Verb::Regenerate(_)
        | Verb::Capture(_)
        | Verb::Train(_)
        | Verb::Bundle(_) => Together::Joins,
        Verb::Make(_) => Together::Refuses("make"),
        Verb::Init(_) => Together::Refuses("init"),
        Verb::Quickstart(_) => Together::Refuses("quickstart"),
        Verb::Serve(_) => Together::Refuses("serve"),
        Verb::Push(_) => Together::Refuses("push"),
        Verb::Doctor(_)
        | Verb::Pull(_)
        | Verb::List(_)
        | Verb::Status(_)
        | Verb::Inspect(_)
        | Verb::Generate(_)
        | Verb::Bench(_)
        | Verb::Completions(_)
        | Verb::Man(_) => Together::Apart,
    }
}

/// How long a process whose launch is refused waits for rank 0 to say so: its own end might take rank 0 with it.
const TOLD_BY_FIRST: Duration = Duration::from_secs(3);

/// Arguments of a verb that computes on the device of `--device`.
pub(crate) trait OnDevice {
    /// Does its work, whatever the kernels are.
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure>;
}

struct On<'a, A> {
    args: &'a A,
    session: &'a Session,
}

impl<A: OnDevice> Work for On<'_, A> {
    type Done = Result<u8, Failure>;

    fn on<K: Backend>(self, kernels: Arc<K>) -> Result<u8, Failure> {
        self.args.on(self.session, &kernels)
    }
}

impl Session {
    /// Finds the caches, and the other processes if a launcher started several.
    ///
    /// # Errors
    /// A launch that cannot be joined: said by rank 0, the others end without a word.
    pub(crate) fn new(cli: &Cli) -> Result<Session, Failure> {
        let launch = Launch::of(variable);
        let ranks = match together(&cli.verb) {
            Together::Joins => Ranks::join(
                launch.as_ref(),
                |told| Failure::told(vec![told.clone()]).tell(),
                |code| std::process::exit(i32::from(code)),
            ),
            Together::Refuses(verb) => match &launch {
                Some(launch) => Err(launch.refuse(verb)),
                None => Ok(Ranks::alone()),
            },
            Together::Apart => Ok(Ranks::alone()),
        };
        let ranks = ranks.map_err(|error| match launch.is_some_and(|launch| launch.rank > 0) {
            true => {
                std::thread::sleep(TOLD_BY_FIRST);
                Failure::told(Vec::new())
            }
            false => error.into(),
        })?;
        let mut places = Places::from_vars(variable);
        places.offline |= cli.offline;
        // `pull` is there to check what came.
        places.pack_cache = !cli.no_pack_cache && !matches!(cli.verb, Verb::Pull(_));
        let (stop, reload) = (Stop::default(), Arc::new(AtomicBool::new(false)));
        let reloads = matches!(cli.verb, Verb::Serve(_)).then(|| Arc::clone(&reload));
        signals::watch(stop.clone(), reloads, ranks.is_first());
        let printer = Printer::new(cli.quiet || !ranks.is_first());
        Ok(Session { places, printer, stop, roots: shipped_roots(), reload, ranks })
    }

    /// Where bundles are found by name.
    pub(crate) fn shelf(&self) -> Shelf<'_> {
        Shelf { places: &self.places, roots: &self.roots, report: &self.printer, stop: &self.stop }
    }

    /// The folder of whatever is written where a bundle is asked.
    pub(crate) fn bundle(&self, written: &Path) -> Result<PathBuf, Error> {
        self.shelf().bundle(written)
    }

    /// What a run needs of this.
    pub(crate) fn env(&self) -> Env<'_> {
        Env {
            places: &self.places,
            report: &self.printer,
            stop: &self.stop,
            variable,
            roots: &self.roots,
            ranks: &self.ranks,
        }
    }

    /// Ends with an error, and all other processes with it.
    pub(crate) fn fail(&self, failure: Failure) -> ExitCode {
        self.ranks.give_up(failure.all_told());
        let code = failure.code();
        let ended = failure.print();
        self.ranks.abort(code);
        ended
    }

    /// Does a verb's work on the device of `--device`.
    ///
    /// # Errors
    /// A device that is not there or does not decode, threads beside one that has none, and what the work ends with.
    pub(crate) fn work(
        &self,
        device: Device,
        threads: Option<u32>,
        args: &impl OnDevice,
    ) -> Result<u8, Failure> {
        if device != Device::Cpu && threads.is_some() {
            return Err(Failure::input(
                format!("`--threads` counts threads of the CPU, and `--device {device}` computes on a card"),
                Some("leave one of them out".to_string()),
            ));
        }
        let around = Around { variable, python: &self.places.python, report: &self.printer };
        let compute = Compute::for_decoding(device, around)?;
        compute.work(threads.map_or_else(default_threads, |t| t as usize), On { args, session: self })?
    }

    /// Locates and loads a target on this machine's own kernels, with its weights as stored or as 32-bit floats.
    pub(crate) fn load_target(
        &self,
        sources: &[String],
        sha256: Option<&str>,
        f32: bool,
        threads: Option<u32>,
    ) -> Result<LoadedTarget, Error> {
        let threads = threads.map_or_else(default_threads, |t| t as usize);
        self.load_target_on(&Arc::new(Host::new(threads)), sources, sha256, f32)
    }

    /// The same on the kernels of a device.
    pub(crate) fn load_target_on<K: Backend>(
        &self,
        kernels: &Arc<K>,
        sources: &[String],
        sha256: Option<&str>,
        f32: bool,
    ) -> Result<LoadedTarget<K>, Error> {
        let options = TargetOptions {
            sources,
            sha256,
            precision: if f32 { Precision::F32 } else { Precision::Stored },
            threads: kernels.threads(),
            template: None,
        };
        let target = LoadedTarget::load_on(kernels, &options, &self.places, &self.printer, &self.stop)?;
        kernels.notes().iter().for_each(|note| self.printer.note(note));
        Ok(target)
    }

    /// Loads a draft beside its target, and says so where these are not the weights that it was trained beside.
    pub(crate) fn load_draft<K: Backend>(
        &self,
        dir: &Path,
        target: &LoadedTarget<K>,
        mode: PackMode,
    ) -> Result<LoadedDraft<K>, Error> {
        let draft = load_draft(dir, target, mode)?;
        if let Some(warning) = weights_warning(&draft, target) {
            self.printer.note(&warning);
        }
        Ok(draft)
    }

    /// Loads a draft from wherever it comes; `mode` is how a bundle is packed, a model runs as the target does.
    pub(crate) fn load_source<K: Backend>(
        &self,
        source: DraftSource<'_>,
        target: &LoadedTarget<K>,
        mode: PackMode,
    ) -> Result<LoadedDraft<K>, Error> {
        let draft = match source {
            DraftSource::Bundle(dir) => self.load_draft(dir, target, mode),
            DraftSource::Model(reference) => {
                load_small(reference, target, &self.places, &self.printer, &self.stop)
            }
        }?;
        target.target.kernels().notes().iter().for_each(|note| self.printer.note(note));
        Ok(draft)
    }
}

/// Where a draft comes from.
#[derive(Clone, Copy)]
pub(crate) enum DraftSource<'a> {
    /// The folder of a bundle.
    Bundle(&'a Path),
    /// A reference to an ordinary model.
    Model(&'a str),
}

impl DraftSource<'_> {
    /// What `--bundle` and `--draft-model` name; clap refuses both at once.
    pub(crate) fn of<'a>(bundle: Option<&'a PathBuf>, model: Option<&'a String>) -> Option<DraftSource<'a>> {
        let bundle = bundle.map(|dir| DraftSource::Bundle(dir));
        bundle.or_else(|| model.map(|reference| DraftSource::Model(reference)))
    }

    /// The same where clap made sure that one of them is there.
    pub(crate) fn needed<'a>(bundle: Option<&'a PathBuf>, model: Option<&'a String>) -> DraftSource<'a> {
        DraftSource::of(bundle, model).unwrap_or(DraftSource::Bundle(Path::new("")))
    }
}

/// Loads a draft and its target: the one named, or the sources that a bundle remembers.
pub(crate) fn target_and_draft<K: Backend>(
    kernels: &Arc<K>,
    source: DraftSource<'_>,
    target: Option<&String>,
    session: &Session,
) -> Result<(LoadedTarget<K>, LoadedDraft<K>), Failure> {
    let sources = target_sources(Some(source), target)?;
    let target = session.load_target_on(kernels, &sources, None, false)?;
    let draft = session.load_source(source, &target, PackMode::Q8)?;
    Ok((target, draft))
}

/// References of the target: the one that is named, or those that a bundle remembers.
pub(crate) fn target_sources(
    source: Option<DraftSource<'_>>,
    target: Option<&String>,
) -> Result<Vec<String>, Failure> {
    let name_it = || Some("name the target with `--target REF`".to_string());
    Ok(match (target, source) {
        (Some(reference), _) => vec![reference.clone()],
        (None, None) => return Err(Failure::input("no target is named", name_it())),
        (None, Some(DraftSource::Bundle(bundle))) => {
            let sources = target_references(bundle)?;
            if sources.is_empty() {
                let message = format!("bundle `{}` names no source of its target", bundle.display());
                return Err(Failure::input(message, name_it()));
            }
            let is_to_be_had =
                |s: &String| s.starts_with("hf:") || s.starts_with("pip:") || Path::new(s).exists();
            if !sources.iter().any(is_to_be_had) {
                let message = format!(
                    "bundle `{}` names its target as `{}`, which is not here",
                    bundle.display(),
                    sources.join("`, `")
                );
                return Err(Failure::input(message, name_it()));
            }
            sources
        }
        (None, Some(DraftSource::Model(reference))) => {
            let message = format!("draft model `{reference}` does not say which target it drafts for");
            return Err(Failure::input(message, name_it()));
        }
    })
}

/// Where installers put what ships with a program, beside the folder of programs.
const SHARE: &str = "share/draftsmith";

/// Where things that ship with draftsmith are looked for, as a checkout or an installed copy has them, in this order: the
/// current folder and those above it; beside the program (whose link is followed) and above that, as such and below
/// `share/draftsmith`; the user's own data folder.
fn shipped_roots() -> Vec<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().and_then(|p| p.canonicalize()).unwrap_or_default();
    let beside = program.ancestors().skip(1).flat_map(|folder| [folder.to_path_buf(), folder.join(SHARE)]);
    here.ancestors().map(Path::to_path_buf).chain(beside).chain(shipped_data()).collect()
}

/// Something that ships with draftsmith.
pub(crate) fn find_shipped(path: &str) -> Option<PathBuf> {
    shipped_roots().into_iter().map(|folder| folder.join(path)).find(|found| found.exists())
}

/// The user's own data folder of this program.
pub(crate) fn shipped_data() -> Option<PathBuf> {
    variable("XDG_DATA_HOME")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".local/share")))
        .map(|folder| folder.join("draftsmith"))
}

/// The environment, for text values.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
