//! Several models in one process: which are loaded, who uses them, and which one goes when memory is short.
//!
//! A model is loaded when a request names it, one at a time, by the thread that knows where models come from
//! ([`crate::Server::attend`]); requests for it wait meanwhile. Before that, models that are not used go, the one that
//! was not used for longest first, until the estimates of all have room. Where all are used, the one that was not asked
//! for longest takes no more requests, and goes when those under way have ended.
//!
//! Invariants: a model of which somebody holds a [`Lease`] stays; the estimates of the models that are loaded add up to
//! no more than the limit. A model that cannot be loaded fails the requests that wait for it and nothing else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use draftsmith_kernels::Kernels;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::{Notify, oneshot};

use crate::api::ApiError;
use crate::metrics::Metrics;
use crate::queue::Order;
use crate::swap::Refused;
use crate::{App, Employ, Log, Model, Service};

/// Where the models of a server come from.
pub trait Models<K: Kernels> {
    /// Bytes that a model will take in memory, as far as that can be told before it is loaded.
    ///
    /// # Errors
    /// [`Refused`], naming the file.
    fn bytes(&mut self, name: &str) -> Result<u64, Refused>;

    /// Loads a model.
    ///
    /// # Errors
    /// [`Refused`], naming the file.
    fn load(&mut self, name: &str) -> Result<Model<K>, Refused>;
}

/// What the server wants of [`Models`], with where the answer goes.
pub(crate) enum Wish {
    Bytes(String, oneshot::Sender<Result<u64, Refused>>),
    Load(String, oneshot::Sender<Result<Box<dyn Employ>, Refused>>),
}

/// One of the models.
struct Member {
    name: String,
    metrics: Arc<Metrics>,
    loaded: Option<Loaded>,
    /// Leases.
    held: usize,
    /// Grows with each lease, over all models: the smallest was not used for longest.
    used: u64,
    /// It takes no more requests: it goes when those under way have ended.
    leaving: bool,
    /// When it could not be loaded the last time, and why.
    failed: Option<(Instant, Refused)>,
}

struct Loaded {
    service: Arc<Service>,
    worker: JoinHandle<()>,
    bytes: u64,
}

type Labels = Vec<(&'static str, String)>;

/// What happened to the models.
#[derive(Default)]
struct Counts {
    loaded: Family<Labels, Gauge>,
    bytes: Family<Labels, Gauge>,
    loads: Family<Labels, Counter>,
    unloads: Family<Labels, Counter>,
}

/// See the module.
pub(crate) struct Fleet {
    members: Mutex<Vec<Member>>,
    /// Bytes that the models may take together.
    memory: u64,
    /// Held while a model is loaded.
    loading: tokio::sync::Mutex<()>,
    /// The last lease of a model was given back.
    freed: Notify,
    wishes: Mutex<Sender<Wish>>,
    /// Nothing is loaded any more.
    closed: AtomicBool,
    counts: Counts,
    /// Of requests that name no model of ours.
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) created_unix_s: u64,
    log: Log,
}

/// A model that stays as long as this is held.
#[derive(Clone)]
pub(crate) struct Lease {
    // Dropped first: then nobody uses it when the lease is given back.
    service: Arc<Service>,
    _held: Option<Arc<Held>>,
}

impl Lease {
    /// Of a model that is never unloaded.
    pub(crate) fn lasting(service: &Arc<Service>) -> Lease {
        Lease { service: Arc::clone(service), _held: None }
    }
}

impl std::ops::Deref for Lease {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.service
    }
}

struct Held {
    fleet: Arc<Fleet>,
    place: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut members = self.fleet.members();
        members[self.place].held -= 1;
        if members[self.place].held == 0 {
            self.fleet.freed.notify_one();
        }
    }
}

/// What can be made room with.
enum Room {
    Enough,
    /// This one goes now.
    Goes(usize),
    /// One goes once its requests have ended.
    Later,
    /// It would not fit if it were alone.
    Never,
}

impl Fleet {
    pub(crate) fn new(
        names: Vec<String>,
        memory: u64,
        wishes: Sender<Wish>,
        created_unix_s: u64,
        log: Log,
    ) -> Fleet {
        let member = |name: String| Member {
            metrics: Arc::new(Metrics::new(&name)),
            name,
            loaded: None,
            held: 0,
            used: 0,
            leaving: false,
            failed: None,
        };
        Fleet {
            members: Mutex::new(names.into_iter().map(member).collect()),
            memory,
            loading: tokio::sync::Mutex::default(),
            freed: Notify::new(),
            wishes: Mutex::new(wishes),
            closed: AtomicBool::new(false),
            counts: Counts::default(),
            metrics: Arc::new(Metrics::new("")),
            created_unix_s,
            log,
        }
    }

    fn members(&self) -> MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, name: &str) -> Result<usize, ApiError> {
        let members = self.members();
        members.iter().position(|member| member.name == name).ok_or_else(|| {
            let served: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
            ApiError::no_model(name, &served)
        })
    }

    /// A lease, if the model is loaded and stays.
    fn take(self: &Arc<Fleet>, place: usize) -> Option<Lease> {
        let mut members = self.members();
        let used = members.iter().map(|member| member.used).max().unwrap_or(0) + 1;
        let member = members.get_mut(place).filter(|member| !member.leaving)?;
        let service = Arc::clone(&member.loaded.as_ref()?.service);
        (member.held, member.used) = (member.held + 1, used);
        Some(Lease { service, _held: Some(Arc::new(Held { fleet: Arc::clone(self), place })) })
    }

    /// A lease of the model that was used last, if one is loaded; that does not count as a use.
    pub(crate) fn latest(self: &Arc<Fleet>) -> Option<Lease> {
        let place = {
            let members = self.members();
            let loaded = members.iter().enumerate().filter(|(_, m)| m.loaded.is_some() && !m.leaving);
            loaded.max_by_key(|(_, member)| member.used)?.0
        };
        self.look(place)
    }

    /// A lease of this model for somebody who only looks, if it is loaded.
    fn look(self: &Arc<Fleet>, place: usize) -> Option<Lease> {
        let mut members = self.members();
        let member = members.get_mut(place)?;
        let service = Arc::clone(&member.loaded.as_ref()?.service);
        member.held += 1;
        Some(Lease { service, _held: Some(Arc::new(Held { fleet: Arc::clone(self), place })) })
    }

    /// The same by name; an unknown name is an error.
    pub(crate) fn loaded(self: &Arc<Fleet>, name: &str) -> Result<Option<Lease>, ApiError> {
        Ok(self.look(self.place(name)?))
    }

    /// A lease, for which the model is loaded if it must be.
    pub(crate) async fn lease(
        self: &Arc<Fleet>,
        app: &Arc<App>,
        name: &str,
        arrived: Instant,
    ) -> Result<Lease, ApiError> {
        let place = self.place(name)?;
        if let Some(lease) = self.take(place) {
            return Ok(lease);
        }
        let time = app.options.limits.request_time;
        // On a task of its own: what was begun goes on if the one who asked leaves.
        let (fleet, app) = (Arc::clone(self), Arc::clone(app));
        let task = tokio::spawn(async move { fleet.bring(&app, place, arrived).await });
        match tokio::time::timeout_at((arrived + time).into(), task).await {
            Ok(Ok(brought)) => brought,
            Ok(Err(_)) => Err(ApiError::failed("its model cannot be loaded")),
            Err(_) => Err(ApiError::timeout(time.as_secs_f64())),
        }
    }

    /// Loads a model, unless another request did while this one waited.
    async fn bring(
        self: &Arc<Fleet>,
        app: &Arc<App>,
        place: usize,
        arrived: Instant,
    ) -> Result<Lease, ApiError> {
        let _one_at_a_time = self.loading.lock().await;
        if let Some(lease) = self.take(place) {
            return Ok(lease);
        }
        let (name, failed) = {
            let member = &self.members()[place];
            (member.name.clone(), member.failed.clone())
        };
        // It was tried while this request waited: it would end in the same way.
        if let Some((_, refused)) = failed.filter(|(when, _)| *when > arrived) {
            return Err(ApiError::not_loaded(&name, &refused));
        }
        let deadline = arrived + app.options.limits.request_time;
        let loaded = match self.load(app, place, &name, deadline).await {
            Ok(loaded) => loaded,
            Err(Trouble::Refused(refused)) => {
                (self.log)(&format!("model `{name}` cannot be loaded: {}", refused.message));
                let error = ApiError::not_loaded(&name, &refused);
                self.members()[place].failed = Some((Instant::now(), refused));
                self.counts.loads.get_or_create(&labels(&name, Some("failed"))).inc();
                return Err(error);
            }
            Err(Trouble::Api(error)) => return Err(error),
        };
        let bytes = loaded.bytes;
        {
            let mut members = self.members();
            members[place].loaded = Some(loaded);
            members[place].failed = None;
        }
        self.counts.loads.get_or_create(&labels(&name, Some("loaded"))).inc();
        (self.log)(&format!("model `{name}`: loaded, about {} MiB", bytes >> 20));
        self.take(place).ok_or_else(|| ApiError::failed("its model went as soon as it came"))
    }

    async fn load(
        self: &Arc<Fleet>,
        app: &Arc<App>,
        place: usize,
        name: &str,
        deadline: Instant,
    ) -> Result<Loaded, Trouble> {
        let bytes = self.wish(|reply| Wish::Bytes(name.to_owned(), reply)).await??;
        self.make_room(name, bytes, deadline).await?;
        let model = self.wish(|reply| Wish::Load(name.to_owned(), reply)).await??;
        let metrics = Arc::clone(&self.members()[place].metrics);
        let (service, worker) = model
            .employ(app, metrics)
            .map_err(|error| Trouble::Refused(Refused { message: error.to_string(), hint: error.hint() }))?;
        Ok(Loaded { service: Arc::new(service), worker, bytes })
    }

    /// Asks whoever loads models; an error means that nobody will answer any more.
    async fn wish<T>(
        &self,
        wish: impl FnOnce(oneshot::Sender<Result<T, Refused>>) -> Wish,
    ) -> Result<Result<T, Refused>, Trouble> {
        let (reply, answer) = oneshot::channel();
        let sent = self.wishes.lock().unwrap_or_else(PoisonError::into_inner).send(wish(reply));
        sent.map_err(|_| Trouble::Api(ApiError::draining()))?;
        answer.await.map_err(|_| Trouble::Api(ApiError::draining()))
    }

    /// Unloads what is not used until so many bytes have room, or waits until it can.
    async fn make_room(self: &Arc<Fleet>, name: &str, bytes: u64, deadline: Instant) -> Result<(), Trouble> {
        let room = self.find_room(name, bytes, deadline).await;
        // One that was to go may not have to.
        self.members().iter_mut().for_each(|member| member.leaving = false);
        room
    }

    async fn find_room(self: &Arc<Fleet>, name: &str, bytes: u64, deadline: Instant) -> Result<(), Trouble> {
        loop {
            if self.closed.load(Ordering::SeqCst) {
                return Err(Trouble::Api(ApiError::draining()));
            }
            match self.room(bytes) {
                Room::Enough => return Ok(()),
                Room::Goes(place) => self.unload(place, Some(name)).await,
                Room::Never => {
                    let message = format!(
                        "it takes about {} MiB of memory, and the models may take {} MiB (`--memory`)",
                        bytes.div_ceil(1 << 20),
                        self.memory >> 20
                    );
                    let hint = "raise `--memory`, lower `--kv-budget`, or serve a smaller model".to_owned();
                    return Err(Trouble::Refused(Refused { message, hint: Some(hint) }));
                }
                Room::Later => {
                    // A lease that was given back meanwhile has left its mark.
                    let freed = self.freed.notified();
                    if tokio::time::timeout_at(deadline.into(), freed).await.is_err() {
                        return Err(Trouble::Api(ApiError::no_room(name)));
                    }
                }
            }
        }
    }

    fn room(&self, bytes: u64) -> Room {
        let mut members = self.members();
        if bytes > self.memory {
            return Room::Never;
        }
        let taken: u64 = members.iter().filter_map(|m| m.loaded.as_ref()).map(|l| l.bytes).sum();
        if taken.saturating_add(bytes) <= self.memory {
            return Room::Enough;
        }
        let oldest = |members: &[Member], fits: &dyn Fn(&Member) -> bool| {
            let all = members.iter().enumerate().filter(|(_, m)| m.loaded.is_some() && fits(m));
            all.min_by_key(|(_, member)| member.used).map(|(place, _)| place)
        };
        if let Some(place) = oldest(&members, &|member| member.held == 0) {
            return Room::Goes(place);
        }
        // All are used. One of them takes no more requests, or others would come for ever.
        if !members.iter().any(|member| member.leaving)
            && let Some(place) = oldest(&members, &|_| true)
        {
            members[place].leaving = true;
        }
        Room::Later
    }

    /// Unloads a model, and is back when its memory is.
    async fn unload(self: &Arc<Fleet>, place: usize, for_whom: Option<&str>) {
        let (name, loaded) = {
            let mut members = self.members();
            let member = &mut members[place];
            // Somebody may have come for it meanwhile.
            if member.held > 0 && for_whom.is_some() {
                return;
            }
            member.leaving = false;
            (member.name.clone(), member.loaded.take())
        };
        let Some(Loaded { service, worker, bytes }) = loaded else { return };
        service.queue.order(Order::Stop);
        let end = move || {
            // A panic of the worker was told where it happened.
            let _ = worker.join();
            drop(service);
        };
        let _ = tokio::task::spawn_blocking(end).await;
        self.counts.unloads.get_or_create(&labels(&name, None)).inc();
        if let Some(other) = for_whom {
            let size = bytes >> 20;
            (self.log)(&format!("model `{name}`: unloaded, about {size} MiB, to make room for `{other}`"));
        }
    }

    /// Loads nothing more: who waits for room hears that the server goes down.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.freed.notify_one();
    }

    /// Ends the answers of all models.
    pub(crate) fn cut_all(&self) {
        for loaded in self.members().iter().filter_map(|member| member.loaded.as_ref()) {
            loaded.service.queue.order(Order::CutAll);
        }
    }

    /// Ends all workers.
    pub(crate) fn stop(&self) {
        let loaded: Vec<Loaded> =
            self.members().iter_mut().filter_map(|member| member.loaded.take()).collect();
        for Loaded { service, worker, .. } in loaded {
            service.queue.order(Order::Stop);
            // A panic of the worker was told where it happened.
            let _ = worker.join();
        }
    }

    /// Leases of all models that are loaded.
    pub(crate) fn all_loaded(self: &Arc<Fleet>) -> Vec<Lease> {
        let count = self.members().len();
        (0..count).filter_map(|place| self.look(place)).collect()
    }

    /// The name of the first model.
    pub(crate) fn first(&self) -> String {
        self.members().first().map(|member| member.name.clone()).unwrap_or_default()
    }

    /// The metrics of a model, or of requests that name none of ours.
    pub(crate) fn metrics_of(&self, name: Option<&str>) -> Arc<Metrics> {
        let members = self.members();
        let member = members.iter().find(|member| Some(member.name.as_str()) == name);
        Arc::clone(member.map_or(&self.metrics, |member| &member.metrics))
    }

    /// Name and state of each model, in the order of the command line.
    pub(crate) fn states(&self) -> Vec<(String, Option<Arc<Service>>, Value)> {
        let members = self.members();
        let state = |member: &Member| {
            let state = match (&member.loaded, &member.failed) {
                (Some(_), _) if member.leaving => "unloading",
                (Some(_), _) => "loaded",
                (None, Some(_)) => "failed",
                (None, None) => "not loaded",
            };
            let mut value = json!({"id": member.name, "state": state});
            if let Some(loaded) = &member.loaded {
                value["bytes"] = loaded.bytes.into();
            }
            if let (None, Some((_, refused))) = (&member.loaded, &member.failed) {
                value["error"] = refused.message.as_str().into();
            }
            (member.name.clone(), member.loaded.as_ref().map(|l| Arc::clone(&l.service)), value)
        };
        members.iter().map(state).collect()
    }

    /// The metrics page, but for what concerns the process.
    pub(crate) fn page(&self) -> String {
        let mut pages = Vec::new();
        {
            let members = self.members();
            self.counts.loaded.clear();
            self.counts.bytes.clear();
            for member in members.iter() {
                let draft = member.loaded.as_ref().and_then(|loaded| loaded.service.board.draft());
                member.metrics.name_draft(draft.as_ref());
                let of = labels(&member.name, None);
                self.counts.loaded.get_or_create(&of).set(i64::from(member.loaded.is_some()));
                let bytes = member.loaded.as_ref().map_or(0, |loaded| loaded.bytes);
                self.counts.bytes.get_or_create(&of).set(i64::try_from(bytes).unwrap_or(i64::MAX));
                pages.push(member.metrics.body());
            }
        }
        let general = self.metrics.body();
        pages.push(families(&general, |name| GENERAL.contains(&name)));
        let mut registry = Registry::default();
        let counts = &self.counts;
        registry.register("draftsmith:model_loaded", "1 for models that are loaded", counts.loaded.clone());
        let help = "Memory that a loaded model is estimated to take";
        registry.register("draftsmith:model_bytes", help, counts.bytes.clone());
        registry.register("draftsmith:model_loads", "Models loaded, by outcome", counts.loads.clone());
        registry.register("draftsmith:model_unloads", "Models unloaded", counts.unloads.clone());
        let mut own = String::new();
        encode_registry(&mut own, &registry).expect("a string takes any text");
        pages.push(own);
        joined(&pages)
    }
}

/// What is counted of requests that name no model of ours.
const GENERAL: [&str; 3] = ["draftsmith:http_requests", "draftsmith:connections", "draftsmith:panics"];

/// Why a model is not there.
enum Trouble {
    /// It cannot be loaded.
    Refused(Refused),
    /// It was not even tried.
    Api(ApiError),
}

impl From<Refused> for Trouble {
    fn from(refused: Refused) -> Trouble {
        Trouble::Refused(refused)
    }
}

fn labels(name: &str, outcome: Option<&str>) -> Labels {
    let outcome = outcome.map(|outcome| ("outcome", outcome.to_owned()));
    [("model_name", name.to_owned())].into_iter().chain(outcome).collect()
}

/// The name that a line of a metrics page gives its family, if it is one of the lines before the samples.
fn family(line: &str) -> Option<&str> {
    let rest = ["# HELP ", "# TYPE ", "# UNIT "].iter().find_map(|head| line.strip_prefix(head))?;
    rest.split(' ').next()
}

/// The families of a page that are wanted.
fn families(page: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut keep = false;
    let mut out = String::new();
    for line in page.lines() {
        if let Some(name) = family(line) {
            keep = wanted(name);
        }
        if keep {
            out.extend([line, "\n"]);
        }
    }
    out
}

/// Pages of several registries as one: what belongs to a family stands together, as the format wants it.
fn joined(pages: &[String]) -> String {
    let mut found: Vec<(&str, String, String)> = Vec::new();
    for page in pages {
        let (mut at, mut is_new) = (0, false);
        for line in page.lines() {
            match family(line) {
                Some(name) if found.get(at).is_none_or(|(known, ..)| *known != name) || !is_new => {
                    match found.iter().position(|(known, ..)| *known == name) {
                        Some(place) => (at, is_new) = (place, false),
                        None => {
                            (at, is_new) = (found.len(), true);
                            found.push((name, format!("{line}\n"), String::new()));
                        }
                    }
                }
                Some(_) => found[at].1.extend([line, "\n"]),
                None => {
                    if let Some((.., samples)) = found.get_mut(at) {
                        samples.extend([line, "\n"]);
                    }
                }
            }
        }
    }
    found.into_iter().map(|(_, head, samples)| head + &samples).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_several_models_are_one_in_which_each_family_stands_together() {
        let page = |model: &str| {
            format!(
                "# HELP a Counts.\n# TYPE a counter\na_total{{m=\"{model}\"}} 1\n# HELP t Times.\n# TYPE t histogram\n\
                 # UNIT t seconds\nt_sum{{m=\"{model}\"}} 2\nt_count{{m=\"{model}\"}} 3\n"
            )
        };
        let more = "# HELP b More.\n# TYPE b gauge\nb 1\n".to_string();
        let found = joined(&[page("x"), page("y"), more]);
        assert_eq!(
            found,
            "# HELP a Counts.\n# TYPE a counter\na_total{m=\"x\"} 1\na_total{m=\"y\"} 1\n# HELP t Times.\n\
             # TYPE t histogram\n# UNIT t seconds\nt_sum{m=\"x\"} 2\nt_count{m=\"x\"} 3\nt_sum{m=\"y\"} 2\n\
             t_count{m=\"y\"} 3\n# HELP b More.\n# TYPE b gauge\nb 1\n"
        );
        assert_eq!(families(&found, |name| name == "b"), "# HELP b More.\n# TYPE b gauge\nb 1\n");
        // Real pages: every head comes once, and no sample is lost.
        let pages = ["x", "y"].map(|name| Metrics::new(name).body());
        let both = joined(&pages);
        let heads: Vec<&str> = both.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        assert_eq!(heads.len(), pages[0].lines().filter(|line| line.starts_with("# TYPE ")).count());
        let samples = |page: &str| page.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(samples(&both), samples(&pages[0]) + samples(&pages[1]));
    }
}
