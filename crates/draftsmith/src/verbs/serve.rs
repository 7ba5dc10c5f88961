//! `draftsmith serve`.

use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use draftsmith::bundle::{check_with_target, has_manifest};
use draftsmith::catalogue::catalogued;
use draftsmith::cli::{self, KvBudget};
use draftsmith::core::VerifyRule;
use draftsmith::costs::{with_costs, with_kept_costs};
use draftsmith::decode::DraftPlan;
use draftsmith::device::Backend;
use draftsmith::disk::human;
use draftsmith::doctor::memory_bytes;
use draftsmith::engine::{
    LoadedDraft, LoadedTarget, SMALL, bundle_place, default_plan, engine, load_draft, load_small, locate,
    target_references, weight_bytes,
};
use draftsmith::kernels::{Kernels, PackMode, catch_failure};
use draftsmith::pull::Places;
use draftsmith::report::{Report, Silent, Stop};
use draftsmith::serve::{
    ApiKey, DraftInfo, Drafts, Limits, Loaded, Log, Model, Models, Options, Origin, Refused, RequestLog,
    Server, tool_formats,
};
use draftsmith::shelf::Shelf;
use draftsmith::text::{Message, RenderOptions};
use draftsmith::{Error, formats};
use serde_json::{Value, json};

use super::generate::plan;
use super::served_runs::ServedRuns;
use super::{DraftSource, OnDevice, Session, target_sources, variable};
use crate::failure::{self, Failure};
use crate::printer;

/// How often the wish to end is looked for.
const POLL: Duration = Duration::from_millis(50);

/// Reads drafts for the target that is being served.
struct Bundles<K: Kernels> {
    target: LoadedTarget<K>,
    places: Places,
    stop: Stop,
    /// Where bundles of the catalogue may lie.
    roots: Vec<PathBuf>,
    /// The draft model that it was started with.
    small: Option<PathBuf>,
}

impl<K: Backend> Drafts<K> for Bundles<K> {
    fn load(&self, bundle: &Path) -> Result<Loaded<K>, Refused> {
        let read = catch_failure(|| self.read(bundle));
        read.unwrap_or_else(|failure| Err(Refused { message: failure.message, hint: Some(failure.hint) }))
    }
}

impl<K: Backend> Bundles<K> {
    fn read(&self, bundle: &Path) -> Result<Loaded<K>, Refused> {
        let refused = |error: Error| Refused { message: error.to_string(), hint: error.hint() };
        let joined = |draft: LoadedDraft<K>| {
            let engine = engine(&self.target, Some(&draft));
            let engine = with_kept_costs(engine, &self.places, &self.target, &draft);
            Ok(Loaded { info: info(&draft), engine })
        };
        // No bundle is a GGUF file; a folder can be either, unless it is the draft model that is in use.
        if self.small.as_deref() == Some(bundle) || bundle.extension().is_some_and(|e| e == "gguf") {
            let reference = bundle.to_string_lossy();
            let draft = load_small(&reference, &self.target, &self.places, &Silent, &self.stop);
            return joined(draft.map_err(refused)?);
        }
        let shelf = Shelf { places: &self.places, roots: &self.roots, report: &Silent, stop: &self.stop };
        let bundle = &shelf.bundle(bundle).map_err(refused)?;
        if has_manifest(bundle) {
            let report = check_with_target(bundle, &self.target.info(), &self.target.target)
                .map_err(|error| refused(error.into()))?;
            if let Some(problem) = report.failures().next() {
                let message = format!("bundle `{}`: {problem}", bundle.display());
                return Err(Refused { message, hint: problem.hint() });
            }
        }
        joined(load_draft(bundle, &self.target, PackMode::Q8).map_err(refused)?)
    }
}

fn info<K: Kernels>(draft: &LoadedDraft<K>) -> DraftInfo {
    DraftInfo {
        name: draft.artifact.name.clone(),
        kind: draft.artifact.kind.clone(),
        bundle: draft.path.clone(),
        sha256: draft.artifact.sha256.clone(),
        plan: default_plan(draft),
    }
}

/// Keys of a file's lines, or of a variable's parts: `KEY` or `NAME KEY`.
fn keys<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<ApiKey> {
    let lines = lines.map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .enumerate()
        .map(|(i, line)| match line.split_once(char::is_whitespace) {
            Some((name, key)) => ApiKey::new(name, key.trim()),
            None => ApiKey::new(&format!("key {}", i + 1), line),
        })
        .collect()
}

fn keys_of(file: &Path) -> Result<Vec<ApiKey>, Failure> {
    let bytes = formats::atomic::read(file).map_err(Error::from)?;
    let keys = keys(String::from_utf8_lossy(&bytes).lines());
    // A server that was to be guarded must not stand open because a file is empty.
    match keys.is_empty() {
        true => Err(Failure::input(
            format!("`{}` has no key", file.display()),
            Some("write one key per line, or leave the option out".to_string()),
        )),
        false => Ok(keys),
    }
}

/// The addresses of `--host`: of a name as many as it has, those of IPv4 first, as the default is one.
fn addresses(args: &cli::Serve) -> Result<Vec<SocketAddr>, Failure> {
    let bare = args.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&args.host);
    let wrong = |why: String| {
        let hint = "give a name or an address of this machine, without a port (`--port` has it): `localhost`, \
                    `0.0.0.0` for all of IPv4, `::` for all";
        Failure::input(format!("`--host {}` {why}", args.host), Some(hint.to_string()))
    };
    if bare.is_empty() {
        return Err(wrong("is empty".to_string()));
    }
    let found = (bare, args.port).to_socket_addrs();
    let mut found: Vec<SocketAddr> = found.map_err(|e| wrong(format!("is not found: {e}")))?.collect();
    if found.is_empty() {
        return Err(wrong("has no address".to_string()));
    }
    found.sort_by_key(SocketAddr::is_ipv6);
    found.dedup();
    Ok(found)
}

fn origins(args: &cli::Serve) -> Result<Vec<Origin>, Failure> {
    let origin = |text: &String| {
        text.parse::<Origin>().map_err(|why| {
            let hint = "an origin is `http://HOST:PORT`, `https://HOST`, `null` for files, or `*` for all";
            Failure::input(format!("`--allow-origin {text}`: {why}"), Some(hint.to_string()))
        })
    };
    args.allow_origin.iter().map(origin).collect()
}

/// The shortest sequence: what the template makes of the shortest message, or one token, and one token of an answer.
fn shortest<K: Kernels>(target: &LoadedTarget<K>) -> usize {
    let messages = [Message::new("user", "a")];
    let options = RenderOptions::default().with_generation_prompt(true);
    let text = target.text.template.as_ref().and_then(|template| template.render(&messages, &options).ok());
    let ids = text.and_then(|text| target.text.tokenizer.encode(&text, false).ok());
    ids.map_or(1, |ids| ids.len().max(1)) + 1
}

/// Cache slots of `--kv-budget`, each of `token_bytes`, beside `waiting_bytes` that a draft may hold.
fn cache_slots<K: Backend>(
    args: &cli::Serve,
    target: &LoadedTarget<K>,
    token_bytes: usize,
    waiting_bytes: usize,
) -> Result<usize, Failure> {
    let slots = args.kv_budget.without(waiting_bytes).tokens(token_bytes);
    let least = shortest(target);
    if slots >= least {
        return Ok(slots);
    }
    let context = target.target.config().max_position;
    let unit = |tokens: usize| match args.kv_budget {
        KvBudget::Tokens(_) => KvBudget::Tokens(tokens as u64),
        KvBudget::Bytes(_) => {
            KvBudget::Bytes((tokens * token_bytes + waiting_bytes).next_multiple_of(1 << 10) as u64)
        }
    };
    let draft = match (args.kv_budget, waiting_bytes) {
        (KvBudget::Tokens(_), _) | (_, 0) => String::new(),
        (KvBudget::Bytes(_), _) => format!(
            ", beside {} that {} sequences may hold for the draft (`--max-running` lowers it)",
            human(waiting_bytes as u64),
            args.max_running
        ),
    };
    Err(Failure::input(
        format!(
            "`--kv-budget {}` has room for {slots} of the {least} tokens that the shortest chat of `{}` takes",
            args.kv_budget,
            target.name()
        ),
        Some(format!(
            "give `--kv-budget {}` or more; one sequence of the whole context ({context} tokens) takes {}{draft}",
            unit(least),
            unit(context)
        )),
    ))
}

/// How much to draft where a request does not say; `None`: as the draft was tuned.
fn asked_plan(args: &cli::Serve) -> Result<Option<DraftPlan>, Failure> {
    if args.no_draft {
        return Ok(Some(DraftPlan::None));
    }
    let Some(plan) = plan(&args.drafting) else { return Ok(None) };
    let shaped = !matches!(plan, DraftPlan::Auto | DraftPlan::None);
    if shaped && args.bundle.is_none() && args.draft_model.is_none() && args.models.is_empty() {
        let given = if args.drafting.tree_top_k.is_some() { "--tree-top-k" } else { "--depth" };
        return Err(Failure::input(
            format!("`{given}` says how a draft is asked, and there is no draft"),
            Some("name a draft with `--bundle` or `--draft-model`, or leave the option out".to_string()),
        ));
    }
    if matches!(plan, DraftPlan::Tree { .. }) && args.verifying.verify != VerifyRule::Seeded {
        return Err(Failure::input(
            format!(
                "`--verify {}` needs a chain that the draft draws, and `--tree-top-k` takes its best tokens",
                args.verifying.verify
            ),
            Some("give `--depth` alone, or `--verify seeded`".to_string()),
        ));
    }
    Ok(Some(plan))
}

fn tool_format(args: &cli::Serve) -> Result<Option<String>, Failure> {
    match &args.tool_format {
        Some(name) if !tool_formats().any(|known| known == name) => Err(Failure::input(
            format!("`--tool-format {name}` is not known"),
            Some(format!("choose one of: {}", tool_formats().collect::<Vec<_>>().join(", "))),
        )),
        format => Ok(format.clone()),
    }
}

/// Seconds since 1970.
fn unix_s() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

/// A line on stderr, for people or as an object.
fn log_to_stderr(as_json: bool) -> Log {
    Arc::new(move |line: &str| {
        let object = || json!({"time": unix_s(), "message": line}).to_string();
        let line = if as_json { object() } else { line.to_owned() };
        // Nobody reads stderr: nothing else can be told.
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    })
}

/// A request on one line, for people.
fn request_line(request: &Value) -> String {
    let text = |key: &str| request[key].as_str().unwrap_or("-").to_owned();
    let ms = |key: &str| request[key].as_f64().map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}ms"));
    let reasons = request["finish_reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut ended = reasons.collect::<Vec<_>>().join(",");
    if request["reader_left"] == true {
        ended = "the reader left".to_owned();
    }
    if let Some(message) = request["error"]["message"].as_str() {
        ended = format!("error: {}", message.replace('\n', " "));
    }
    let accept = request["accept_length"].as_f64().map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"));
    format!(
        "{} key={} {}{} {} in={} cached={} out={} queue={} first={} total={} accept={accept} {ended}",
        text("id"),
        text("key"),
        text("route"),
        if request["stream"] == true { " stream" } else { "" },
        request["status"].as_u64().map_or_else(|| "-".to_owned(), |status| status.to_string()),
        request["prompt_tokens"],
        request["cached_tokens"],
        request["completion_tokens"],
        ms("queue_ms"),
        ms("first_token_ms"),
        ms("total_ms"),
    )
}

fn request_log(args: &cli::Serve) -> Option<RequestLog> {
    let as_json = args.log_json;
    (args.log_requests || as_json).then(|| {
        Arc::new(move |request: &Value| {
            let line = if as_json { request.to_string() } else { request_line(request) };
            // Nobody reads stderr: nothing else can be told.
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }) as RequestLog
    })
}

fn options(args: &cli::Serve, log: Log) -> Result<Options, Failure> {
    let mut api_keys = args.api_keys_file.as_deref().map(keys_of).transpose()?.unwrap_or_default();
    api_keys.extend(keys(variable("DRAFTSMITH_API_KEYS").unwrap_or_default().split(',')));
    let admin_key = match &args.admin_key_file {
        Some(file) => keys_of(file)?.into_iter().next(),
        None => variable("DRAFTSMITH_ADMIN_KEY").and_then(|key| keys(key.lines()).into_iter().next()),
    };
    if let Some(folder) = args.records.as_ref().filter(|folder| !folder.is_dir()) {
        return Err(Failure::input(
            format!("`--records {}` is not a folder", folder.display()),
            Some("name a folder with the JSON files that `bench --report` writes".to_string()),
        ));
    }
    let runs = args.runs.as_deref().map(ServedRuns::of).transpose()?;
    Ok(Options {
        addresses: addresses(args)?,
        api_keys,
        admin_key,
        allow_origins: origins(args)?,
        limits: Limits {
            sequences: args.max_running as usize,
            queue: args.queue as usize,
            connections: args.max_connections as usize,
            body_bytes: args.max_body as usize,
            request_time: Duration::from_secs(args.request_timeout.into()),
            drain_time: Duration::from_secs(args.drain_timeout.into()),
            default_max_tokens: args.max_new_tokens as usize,
            watch_steps: args.watch_steps.into(),
        },
        records: args.records.clone(),
        runs: runs.map(|runs| Arc::new(runs) as _),
        keep_generations: args.keep_generations as usize,
        verify: args.verifying.verify,
        plan: asked_plan(args)?,
        tool_format: tool_format(args)?,
        log,
        request_log: request_log(args),
    })
}

fn load<K: Backend>(args: &cli::Serve, session: &Session, kernels: &Arc<K>) -> Result<Model<K>, Failure> {
    let source = DraftSource::of(args.bundle.as_ref(), args.draft_model.as_ref());
    let sources = match source {
        Some(_) => target_sources(source, args.target.as_ref())?,
        None => args.target.iter().cloned().collect(),
    };
    load_model(args, source, &sources, args.model_name.clone(), (session, kernels))
}

/// Loads a target and its draft; without a name the model has that of the target.
fn load_model<K: Backend>(
    args: &cli::Serve,
    source: Option<DraftSource<'_>>,
    sources: &[String],
    name: Option<String>,
    (session, kernels): (&Session, &Arc<K>),
) -> Result<Model<K>, Failure> {
    let target = session.load_target_on(kernels, sources, None, false)?;
    let draft = source.map(|source| session.load_source(source, &target, PackMode::Q8)).transpose()?;
    let config = target.target.config();
    let engine = engine(&target, draft.as_ref());
    // Keys and values, as 16-bit floats, and those of the draft.
    let token_bytes = 2 * config.kv_values() + engine.draft_bytes_per_token();
    // Features that wait for the draft, where every sequence holds as many as it may.
    let waiting_bytes = args.max_running as usize * engine.draft_bytes_per_sequence();
    let cache_slots = cache_slots(args, &target, token_bytes, waiting_bytes)?;
    kernels.room((cache_slots * token_bytes + waiting_bytes) as u64)?;
    let engine = with_costs(engine, &session.places, &target, draft.as_ref(), &session.printer);
    Ok(Model {
        name: name.unwrap_or_else(|| target.name()),
        sha256: target.sha256.clone(),
        engine,
        draft: draft.as_ref().map(info),
        tokenizer: Arc::clone(&target.text.tokenizer),
        template: target.text.template.clone(),
        cache_slots,
        drafts: Arc::new(Bundles {
            target,
            places: session.places.clone(),
            stop: session.stop.clone(),
            roots: session.roots.clone(),
            small: draft.filter(|draft| draft.artifact.kind == SMALL).map(|draft| draft.path),
        }),
    })
}

/// Share of the machine's memory that several models may take, unless it is said.
const MEMORY_SHARE: f64 = 0.8;
/// A model in memory over its file: packed weights take at most that much more.
const PACKED_SHARE: f64 = 1.03;

/// Several models by name, loaded when the server asks for them.
struct Several<'a, K: Backend> {
    args: &'a cli::Serve,
    session: &'a Session,
    kernels: &'a Arc<K>,
}

/// Where one of them comes from.
struct Place {
    /// The bundle's folder, if there is a draft.
    bundle: Option<PathBuf>,
    /// References of the target.
    sources: Vec<String>,
}

impl<K: Backend> Several<'_, K> {
    fn place(&self, name: &str) -> Result<Place, Failure> {
        let model = self.args.models.iter().find(|model| model.name == name);
        let model = model.ok_or_else(|| Failure::input(format!("no model is called `{name}`"), None))?;
        let written = Path::new(&model.place);
        // Beside a target of its own it is a draft in any case; alone it may be a target.
        let is_bundle = model.target.is_some()
            || has_manifest(&bundle_place(written))
            || (!written.exists() && catalogued(&model.place).is_some());
        let bundle = is_bundle.then(|| self.session.bundle(written)).transpose()?;
        let sources = match (&model.target, &bundle) {
            (Some(target), _) => vec![target.clone()],
            (None, None) => vec![model.place.clone()],
            (None, Some(bundle)) => target_references(bundle)?,
        };
        if sources.is_empty() {
            return Err(Failure::input(
                format!("bundle `{}` names no source of its target", written.display()),
                Some(format!("name it: `--model {name}={},target=REF`", model.place)),
            ));
        }
        Ok(Place { bundle, sources })
    }

    fn estimate(&self, name: &str) -> Result<u64, Failure> {
        let session = self.session;
        let place = self.place(name)?;
        let found = locate(&place.sources, None, &session.places, &session.printer, &session.stop)?;
        let target = weight_bytes(&found.path)? as f64 * PACKED_SHARE;
        let draft = place.bundle.map_or(Ok(0), |folder| weight_bytes(&folder))?;
        let cache = match self.args.kv_budget {
            KvBudget::Bytes(bytes) => bytes,
            KvBudget::Tokens(tokens) => {
                let config = draftsmith::run::target_config(&found.path).map_err(Error::from)?;
                // Keys and values as 16-bit floats.
                tokens.saturating_mul(2 * config.kv_values() as u64)
            }
        };
        Ok((target as u64).saturating_add(draft).saturating_add(cache))
    }
}

fn refused(failure: &Failure) -> Refused {
    let (message, hint) = failure.in_words();
    Refused { message, hint }
}

impl<K: Backend> Models<K> for Several<'_, K> {
    fn bytes(&mut self, name: &str) -> Result<u64, Refused> {
        self.estimate(name).map_err(|failure| refused(&failure))
    }

    fn load(&mut self, name: &str) -> Result<Model<K>, Refused> {
        let named = Some(name.to_owned());
        let loaded = self.place(name).and_then(|place| {
            let source = place.bundle.as_deref().map(DraftSource::Bundle);
            let load = || load_model(self.args, source, &place.sources, named, (self.session, self.kernels));
            catch_failure(load).map_err(Error::from)?
        });
        loaded.map_err(|failure| refused(&failure))
    }
}

/// What of several models can be told to be wrong before any is loaded.
fn check_models(args: &cli::Serve, note: &dyn Fn(&str)) -> Result<(), Failure> {
    for (i, model) in args.models.iter().enumerate() {
        if args.models[..i].iter().any(|other| other.name == model.name) {
            return Err(Failure::input(
                format!("`--model {}={}`: another model has this name", model.name, model.place),
                Some("give each model a name of its own".to_string()),
            ));
        }
        // It may come later; until then requests for it hear so.
        let is_path = model.place.starts_with(['/', '.']) || !model.place.contains(':');
        if is_path && !Path::new(&model.place).exists() && catalogued(&model.place).is_none() {
            note(&format!(
                "model `{}`: there is nothing at `{}` yet; requests for it are answered with status 503",
                model.name, model.place
            ));
        }
    }
    Ok(())
}

/// Bytes that several models may take together.
fn memory<K: Backend>(args: &cli::Serve, kernels: &K) -> Result<u64, Failure> {
    let all = || if kernels.is_host() { memory_bytes() } else { kernels.memory() };
    let share = || all().map(|bytes| (bytes as f64 * MEMORY_SHARE) as u64);
    args.memory.map(|memory| memory.0).or_else(share).ok_or_else(|| {
        let hint = "give `--memory`, in GiB: what the models may take together";
        Failure::input("the system does not say how much memory there is", Some(hint.to_string()))
    })
}

pub(crate) fn run(args: &cli::Serve, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::Serve {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        serve(self, session, kernels)
    }
}

fn serve<K: Backend>(args: &cli::Serve, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let log = log_to_stderr(args.log_json);
    let note = |line: &str| match args.log_json {
        true => log(line),
        false => session.printer.note(line),
    };
    failure::outlive_panics();
    if !args.models.is_empty() {
        return serve_several(args, (session, kernels), &log, &note);
    }
    let mut server = Server::start(options(args, Arc::clone(&log))?)?;
    let url = format!("http://{}", server.address());
    note(&format!("listening at {url}, loading the model"));
    let model = load(args, session, kernels)?;
    let mut ready = json!({
        "url": url,
        "model": model.name,
        "draft": model.draft.as_ref().map(|draft| draft.name.clone()),
        "cache_tokens": model.cache_slots,
    });
    name_device(&mut ready, kernels.as_ref());
    server.open(model)?;
    note(&format!("ready: {ready}"));
    if args.json {
        printer::json(&ready)?;
    }
    while !session.stop.requested() {
        if session.reload.swap(false, Ordering::SeqCst) {
            server.reload();
        }
        std::thread::sleep(POLL);
    }
    log("ending: answers under way are finished");
    server.drain();
    log("ended");
    Ok(0)
}

/// Adds what is computed on, if not on the processor.
fn name_device<K: Backend>(ready: &mut Value, kernels: &K) {
    if let Some(device) = kernels.device() {
        ready["device"] = json!(device);
    }
}

/// Several models in one process.
fn serve_several<K: Backend>(
    args: &cli::Serve,
    (session, kernels): (&Session, &Arc<K>),
    log: &Log,
    note: &dyn Fn(&str),
) -> Result<u8, Failure> {
    let memory = memory(args, kernels.as_ref())?;
    check_models(args, note)?;
    let mut server = Server::start(options(args, Arc::clone(log))?)?;
    let names: Vec<String> = args.models.iter().map(|model| model.name.clone()).collect();
    let url = format!("http://{}", server.address());
    let mut ready = json!({"url": url, "models": names, "memory_bytes": memory});
    name_device(&mut ready, kernels.as_ref());
    server.open_fleet(names, memory);
    note(&format!("ready: {ready}"));
    if args.json {
        printer::json(&ready)?;
    }
    let mut models = Several { args, session, kernels };
    while !session.stop.requested() {
        if session.reload.swap(false, Ordering::SeqCst) {
            server.reload();
        }
        server.attend(&mut models, POLL);
    }
    log("ending: answers under way are finished");
    server.drain();
    log("ended");
    Ok(0)
}
