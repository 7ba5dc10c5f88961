//! What can be read without decoding anything: the model, health, metrics, tokens, the bundle, records.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Path as UrlPath, RawQuery, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use draftsmith_core::VerifyRule;
use draftsmith_decode::DraftPlan;
use draftsmith_formats::atomic;
use draftsmith_text::{ChatTemplate, MaskOptions, Turns, mask_conversation};
use serde_json::{Value, json};

use super::ask::{Form, chat_ids, check_model, messages, render_options, text_error};
use super::error::ApiError;
use super::fields::Fields;
use super::tools::Wanted;
use super::{aside, read_for_model};
use crate::board::Board;
use crate::fleet::{Fleet, Lease};
use crate::{App, Served, Service, metrics as page};

type Answer = Result<Json<Value>, ApiError>;

impl Service {
    /// The chat template, or what to use instead.
    pub(super) fn template(&self) -> Result<&ChatTemplate, ApiError> {
        self.template.as_ref().ok_or_else(|| {
            let message = format!("`{}` has no chat template; use /v1/completions", self.name);
            ApiError::invalid("messages", message)
        })
    }

    /// How much to draft where a request does not say: as `serve` was told, else as the draft was tuned.
    pub(super) fn plan(&self, rule: VerifyRule) -> DraftPlan {
        let draft = self.board.draft();
        let plan = match (self.default_plan, draft) {
            (Some(plan @ (DraftPlan::Auto | DraftPlan::None)), _) => plan,
            // The draft that it was meant for may be gone.
            (_, None) => DraftPlan::Auto,
            (Some(plan), Some(_)) => plan,
            (None, Some(draft)) => draft.plan,
        };
        // A tree is no chain that other rules of verification could draw.
        let drawn = rule != VerifyRule::Seeded && matches!(plan, DraftPlan::Tree { .. });
        if drawn { DraftPlan::Auto } else { plan }
    }

    fn card(&self) -> Value {
        json!({
            "id": self.name, "object": "model", "created": self.created_unix_s, "owned_by": "draftsmith",
            "max_model_len": self.context,
        })
    }
}

/// The cards of several models. What only a loaded model can tell is left out of the others.
fn cards(fleet: &Arc<Fleet>) -> Vec<Value> {
    let card = |(name, service, _): (String, Option<Arc<Service>>, Value)| {
        let mut card = json!({
            "id": name, "object": "model", "created": fleet.created_unix_s, "owned_by": "draftsmith",
            "loaded": service.is_some(),
        });
        if let Some(service) = service {
            card["max_model_len"] = service.context.into();
        }
        card
    };
    fleet.states().into_iter().map(card).collect()
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Answer {
    let data = match app.served()? {
        Served::One(service) => vec![service.card()],
        Served::Fleet(fleet) => cards(fleet),
    };
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(super) async fn model(State(app): State<Arc<App>>, UrlPath(name): UrlPath<String>) -> Answer {
    let cards = match app.served()? {
        Served::One(service) => vec![service.card()],
        Served::Fleet(fleet) => cards(fleet),
    };
    let served: Vec<&str> = cards.iter().filter_map(|card| card["id"].as_str()).collect();
    match cards.iter().find(|card| card["id"] == name.as_str()) {
        Some(card) => Ok(Json(card.clone())),
        None => Err(ApiError::no_model(&name, &served)),
    }
}

/// How several models stand.
fn states(fleet: &Arc<Fleet>) -> Value {
    let state = |(_, service, mut state): (String, Option<Arc<Service>>, Value)| {
        if let Some(draft) = service.and_then(|service| service.board.draft()) {
            state["draft"] = draft.name.into();
        }
        state
    };
    fleet.states().into_iter().map(state).collect()
}

/// As vLLM has it; of several models also how they stand.
pub(super) async fn version(State(app): State<Arc<App>>) -> Json<Value> {
    let mut version = json!({"version": env!("CARGO_PKG_VERSION")});
    if let Some(fleet) = app.fleet() {
        version["models"] = states(fleet);
    }
    Json(version)
}

/// 200 once the model and its draft are loaded; of several models at once, with how they stand.
pub(super) async fn health(State(app): State<Arc<App>>) -> Answer {
    app.served()?;
    if app.draining.load(std::sync::atomic::Ordering::SeqCst) {
        return Err(ApiError::draining());
    }
    let mut health = json!({"status": "ok"});
    if let Some(fleet) = app.fleet() {
        health["models"] = states(fleet);
    }
    Ok(Json(health))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = match app.served()? {
        Served::One(service) => {
            service.metrics.name_draft(service.board.draft().as_ref());
            service.metrics.page(app.began_unix_s)
        }
        Served::Fleet(fleet) => page::whole_page(fleet.page(), app.began_unix_s),
    };
    Ok(([(header::CONTENT_TYPE, page::CONTENT_TYPE)], text).into_response())
}

/// The model that `?model=NAME` names.
fn asked_model(query: Option<&str>) -> Option<String> {
    let value = query?.split('&').find_map(|part| part.strip_prefix("model="))?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (first, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*first),
        }
        rest = after;
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The model that a page wants to see: of several the one that is named, or the one that was used last.
pub(super) fn shown(app: &App, query: Option<&str>) -> Result<Lease, ApiError> {
    match (app.served()?, asked_model(query)) {
        (Served::Fleet(fleet), Some(name)) => fleet.loaded(&name)?.ok_or_else(|| ApiError::asleep(&name)),
        _ => app.service(),
    }
}

/// `{"prompt"}` or `{"messages"}` to ids.
pub(super) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Answer {
    let (body, model) = read_for_model(&app, request, Instant::now()).await?;
    let read = move |service: &Service| {
        let fields = Fields::of(&body)?;
        check_model(&fields, service)?;
        let ids = match fields.string("prompt")? {
            Some(text) => {
                let special = fields.bool("add_special_tokens")?.unwrap_or(true);
                service.tokenizer.encode(text, special).map_err(text_error)?
            }
            None => {
                let prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
                chat_ids(&fields, service, prompt)?
            }
        };
        let mut answer = json!({"count": ids.len(), "max_model_len": service.context, "tokens": ids});
        if fields.bool("return_token_strs")?.unwrap_or(false) {
            let text = |id: &u32| String::from_utf8_lossy(service.tokenizer.token_to_piece(*id)).into_owned();
            answer["token_strs"] = ids.iter().map(text).collect();
        }
        Ok(answer)
    };
    Ok(Json(aside(&app, model, read).await?))
}

/// The tokens of a conversation and which of them training would learn; asks for an answer if the last turn is not one.
pub(super) async fn render(State(app): State<Arc<App>>, request: Request) -> Answer {
    let (body, model) = read_for_model(&app, request, Instant::now()).await?;
    let read = move |service: &Service| {
        let fields = Fields::of(&body)?;
        check_model(&fields, service)?;
        let messages = messages(&fields)?;
        let template = service.template()?;
        if messages.last().is_some_and(|message| message.role != "assistant") {
            let ids = chat_ids(&fields, service, fields.bool("add_generation_prompt")?.unwrap_or(true))?;
            return Ok(json!({"token_ids": ids, "loss_mask": vec![0; ids.len()]}));
        }
        let turns = match fields.string("turns")? {
            None | Some("all") => Turns::All,
            Some("last") => Turns::Last,
            Some(other) => {
                return Err(ApiError::invalid(
                    "turns",
                    format!("`turns` is `{other}`, expected `all` or `last`"),
                ));
            }
        };
        let tools = Wanted::read(&fields, Form::Chat, service)?.shown;
        let options = MaskOptions { render: render_options(&fields, tools)?, turns, last_answer_cut: false };
        let rows =
            mask_conversation(&service.tokenizer, template, &messages, &options).map_err(text_error)?;
        let row = |row: &draftsmith_text::MaskedRow| {
            let mask: Vec<u8> = row.loss_mask.iter().map(|trained| u8::from(*trained)).collect();
            json!({"token_ids": row.ids, "loss_mask": mask})
        };
        // A template that rewrites earlier turns gives each answer a row of its own; the last one is the conversation.
        let mut answer = rows.last().map(row).unwrap_or_else(|| json!({"token_ids": [], "loss_mask": []}));
        if rows.len() > 1 {
            answer["rows"] = rows.iter().map(row).collect();
        }
        Ok(answer)
    };
    Ok(Json(aside(&app, model, read).await?))
}

pub(super) async fn state(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Answer {
    let page = |service: &Service| {
        let running = service.metrics.running.get();
        service.board.page(&service.name, running, service.queue.waiting())
    };
    let Some(fleet) = app.fleet() else { return Ok(Json(page(&*app.service()?))) };
    let (name, model) = match asked_model(query.as_deref()) {
        Some(name) => (name.clone(), fleet.loaded(&name)?),
        None => (fleet.first(), fleet.latest()),
    };
    let mut state = match &model {
        Some(model) => page(model),
        // As it will be just before the first request.
        None => Board::new(None).page(&name, 0, 0),
    };
    state["models"] = states(fleet);
    Ok(Json(state))
}

/// A file of the bundle as text; `None` where it has none.
fn text(path: &Path) -> Option<String> {
    let bytes = atomic::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

pub(super) async fn bundle(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Answer {
    let model = shown(&app, query.as_deref())?;
    let read = |service: &Service| {
        let folder = service.board.draft().map(|draft| draft.bundle);
        let file = |name: &str| folder.as_ref().and_then(|folder| text(&folder.join(name)));
        let manifest = file("bundle.json").and_then(|text| serde_json::from_str::<Value>(&text).ok());
        Ok(json!({"bundle": manifest, "results_md": file("RESULTS.md"), "card_md": file("README.md")}))
    };
    Ok(Json(aside(&app, model, read).await?))
}

/// The records by name. Names come from the folders alone, so no request reaches another file.
pub(super) fn find_records(app: &App, service: &Service) -> BTreeMap<String, PathBuf> {
    let bundle = service.board.draft().map(|draft| draft.bundle.join("results"));
    let folders = bundle.into_iter().chain(app.options.records.clone());
    let mut records = BTreeMap::new();
    for folder in folders {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|e| e == "json")
                && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
            {
                records.insert(stem.to_owned(), path.clone());
            }
        }
    }
    records
}

pub(super) fn read_record(path: &Path) -> Option<Value> {
    serde_json::from_slice(&atomic::read(path).ok()?).ok()
}

pub(super) async fn records(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Answer {
    let model = shown(&app, query.as_deref())?;
    let shared = Arc::clone(&app);
    let read = move |service: &Service| {
        let found = find_records(&shared, service);
        let list = found.iter().filter_map(|(name, path)| {
            let record = read_record(path)?;
            Some(json!({"name": name, "kind": super::records::kind(&record), "created": record["created_unix_s"]}))
        });
        Ok(list.collect())
    };
    Ok(Json(aside(&app, model, read).await?))
}

pub(super) async fn record(
    State(app): State<Arc<App>>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let model = shown(&app, query.as_deref())?;
    let shared = Arc::clone(&app);
    let read = move |service: &Service| {
        let path = find_records(&shared, service).remove(&name);
        path.and_then(|path| read_record(&path)).ok_or_else(|| ApiError::no_record(&name))
    };
    Ok(Json(aside(&app, model, read).await?))
}

#[cfg(test)]
mod tests {
    use super::asked_model;

    #[test]
    fn the_model_of_a_query_is_read_as_browsers_write_it() {
        for (query, wanted) in [
            ("model=a", Some("a")),
            ("x=1&model=org%2Fname%3a7b+x", Some("org/name:7b x")),
            ("model=%zz%2", Some("%zz%2")),
            ("model=%C3%A9", Some("é")),
            ("models=a", None),
            ("", None),
        ] {
            assert_eq!(asked_model(Some(query)).as_deref(), wanted, "{query}");
        }
    }
}
