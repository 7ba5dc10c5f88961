//! A request as the client wrote it, checked field by field, to what the engine gets.

use std::sync::Arc;

use draftsmith_core::{Sampling, Shaping, VerifyRule};
use draftsmith_decode::{DraftPlan, GenerateOptions};
use draftsmith_text::{Message, RenderOptions, TextError};
use serde_json::{Map, Value};

use super::echo::Echo;
use super::error::ApiError;
use super::fields::Fields;
use super::responses;
use super::tools::Wanted;
use crate::Service;
use crate::grammar::JsonGrammar;
use crate::speech::SpeechOptions;
use crate::tools::{Need, Tools};

/// Sequences per prompt.
const MOST_CHOICES: i64 = 16;
/// Prompts of one request of `/v1/completions`.
const MOST_PROMPTS: usize = 64;
const MOST_STOPS: usize = 16;
const MOST_LOGPROBS: i64 = 20;
/// Draft tokens of one proposal, and levels of it.
const MOST_NODES: i64 = 64;

/// The routes that answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Completion,
    Responses,
}

/// Fields that would change the answer, and why they are refused. Empty lists, `false` and `null` are let through.
const REFUSED: &[(&str, &str)] = &[
    ("functions", "use `tools`"),
    ("function_call", "use `tool_choice`"),
    ("audio", "the model's answers are text"),
    ("web_search_options", "nothing is searched for"),
    ("best_of", "ask for `n` answers"),
    ("suffix", "text is only continued"),
    ("use_beam_search", "tokens are chosen one by one"),
    ("prompt_logprobs", "ask for `echo` and `logprobs` at /v1/completions"),
    ("min_tokens", "set `ignore_eos`, or a larger `max_tokens`"),
    ("bad_words", "use `logit_bias`"),
    ("allowed_token_ids", "use `logit_bias`"),
    ("continue_final_message", "an answer is a new message"),
    ("truncate_prompt_tokens", "shorten the prompt"),
    ("guided_json", "use `response_format`"),
    ("guided_regex", "use `response_format`"),
    ("guided_choice", "use `response_format`"),
    ("guided_grammar", "use `response_format`"),
    ("structured_outputs", "use `response_format`"),
];

fn refuse(fields: &Fields<'_>) -> Result<(), ApiError> {
    for (name, why) in REFUSED {
        let asks = match fields.get(name) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            // The old words for what is done anyway.
            Some(Value::String(text)) if *name == "function_call" => {
                !matches!(text.as_str(), "none" | "auto")
            }
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(_) => true,
        };
        // One best of one is what there is anyway.
        if asks && !(*name == "best_of" && fields.get(name).and_then(Value::as_u64) == Some(1)) {
            return Err(ApiError::unsupported(name, why));
        }
    }
    if let Some(modalities) = fields.list("modalities")?
        && modalities.iter().any(|m| m != "text")
    {
        return Err(ApiError::unsupported("modalities", "the model's answers are text"));
    }
    Ok(())
}

/// A request that was understood.
pub(crate) struct Asked {
    /// Prompts; one for a chat.
    pub(crate) prompts: Vec<Arc<[u32]>>,
    /// The prompts, if they are to stand before the answers.
    pub(crate) echo: Option<Vec<Echo>>,
    /// Sequences per prompt.
    pub(crate) n: usize,
    pub(crate) options: GenerateOptions,
    /// The grammar of `options`.
    pub(crate) grammar: Option<Arc<JsonGrammar>>,
    /// What the model may call.
    pub(crate) tools: Option<Arc<Tools>>,
    /// What `/v1/responses` says again of the request.
    pub(crate) echoed: Map<String, Value>,
    pub(crate) seed: Option<u64>,
    pub(crate) speech: SpeechOptions,
    /// The request asked for tokens beside the text; `speech` has them if they are kept, too.
    pub(crate) shows_tokens: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) trace: bool,
}

impl Asked {
    /// Sequences in all.
    pub(crate) fn sequences(&self) -> usize {
        self.n * self.prompts.len()
    }

    /// Tokens of all prompts.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.len()).sum()
    }

    /// Reads and checks a body. `keeps`: its tokens are kept, whether it asks for them or not.
    pub(super) fn read(
        body: &Value,
        form: Form,
        service: &Service,
        default_max_tokens: usize,
        keeps: bool,
    ) -> Result<Asked, ApiError> {
        let fields = Fields::of(body)?;
        check_model(&fields, service)?;
        refuse(&fields)?;
        if form == Form::Responses {
            responses::refuse(&fields)?;
        }
        let n = match form {
            Form::Responses => 1,
            Form::Chat | Form::Completion => fields.count("n", 1..=MOST_CHOICES)?.unwrap_or(1),
        };
        let echo = form == Form::Completion && fields.bool("echo")?.unwrap_or(false);
        let (param, wanted, prompts) = match form {
            Form::Completion => {
                no_tools(&fields)?;
                ("prompt", Wanted::default(), prompts(&fields, service)?)
            }
            Form::Chat | Form::Responses => {
                let wanted = Wanted::read(&fields, form, service)?;
                let (param, messages) = match form {
                    Form::Responses => ("input", responses::messages(&fields)?),
                    Form::Chat | Form::Completion => ("messages", messages(&fields)?),
                };
                let open = fields.bool("add_generation_prompt")?.unwrap_or(true);
                let options = render_options(&fields, wanted.shown.clone())?.with_generation_prompt(open);
                let ids = ids_of(&messages, &options, service).map_err(|error| error.at(param))?;
                (param, wanted, vec![Prompt { ids, text: None }])
            }
        };
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        if prompts.iter().any(|prompt| prompt.ids.is_empty()) {
            return Err(ApiError::invalid(param, "the prompt has no tokens"));
        }
        // Without an answer the prompt may fill the context.
        let answers = form != Form::Completion || fields.get("max_tokens").and_then(Value::as_u64) != Some(0);
        if longest + usize::from(answers) > service.context {
            let message = format!(
                "the prompt has {longest} tokens, but the context of the model ends at {}",
                service.context
            );
            return Err(ApiError::too_long(param, message));
        }
        let max_new_tokens = max_tokens(&fields, form, service, longest, default_max_tokens)?;
        let sampling = Sampling {
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map_or(0, |k| k.max(0) as u32),
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0).max(f32::MIN_POSITIVE),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            seed: 0,
        };
        let shaping = Shaping {
            repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(1.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(&fields, service.vocab)?,
        };
        let logprobs = logprobs(&fields, form)?;
        let (format_at, format) = match form {
            Form::Responses => responses::text_format(&fields)?,
            Form::Chat | Form::Completion => (FORMAT_AT, response_format(&fields)?),
        };
        let tools = wanted.tools;
        // The answer's own form counts where it may be something else than calls.
        let called = tools.as_ref().is_some_and(|tools| tools.need == Need::Required);
        let of_format = format.as_ref().filter(|_| !called);
        let of_format = of_format.map(|schema| grammar(schema, format_at, service)).transpose()?;
        let grammar = match &tools {
            Some(tools) => super::tools::grammar(tools, format.as_ref(), service)?.or(of_format),
            None => of_format,
        };
        let ours = fields.object("draftsmith", "draftsmith.")?;
        let trace = ours.map(|f| f.bool("trace")).transpose()?.flatten().unwrap_or(false);
        let draft = draft_plan(ours, service)?;
        let verify = verify(ours, service)?;
        if verify != VerifyRule::Seeded && !sampling.is_greedy() && matches!(draft, DraftPlan::Tree { .. }) {
            let message = format!(
                "`draftsmith.verify` is `{verify}`, which needs a chain, and `draftsmith.draft` is a tree"
            );
            return Err(ApiError::invalid("draftsmith.draft", message));
        }
        let draft = if max_new_tokens == 0 { DraftPlan::None } else { draft };
        let stream = fields.bool("stream")?.unwrap_or(false);
        let stream_options =
            fields.object("stream_options", "stream_options.")?.filter(|_| form != Form::Responses);
        if stream_options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "`stream_options` needs `stream`"));
        }
        let include_usage = stream_options.map(|f| f.bool("include_usage")).transpose()?.flatten();
        let mut stop_ids = match fields.bool("ignore_eos")?.unwrap_or(false) {
            true => Vec::new(),
            false => service.tokenizer.eos_ids().to_vec(),
        };
        if let Some(more) = fields.list("stop_token_ids")? {
            stop_ids.extend(ids(more, "stop_token_ids", service.vocab)?);
        }
        let shows_tokens = trace || logprobs.is_some();
        let speech = SpeechOptions {
            stops: stops(&fields)?,
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            tokens: shows_tokens || keeps,
            tools: tools.clone(),
        };
        let prompt_logprobs = logprobs.filter(|_| echo);
        let scored = prompt_logprobs.is_some();
        let shown = |prompt: &Prompt<'_>| Echo::new(&service.tokenizer, prompt.text, &prompt.ids, scored);
        let echo = echo.then(|| prompts.iter().map(shown).collect());
        Ok(Asked {
            prompts: prompts.into_iter().map(|prompt| Arc::from(prompt.ids)).collect(),
            echo,
            n,
            options: GenerateOptions {
                max_new_tokens,
                sampling,
                stop_ids,
                draft,
                verify,
                shaping,
                logprobs,
                prompt_logprobs,
                grammar: grammar.clone().map(|grammar| grammar as _),
                ..GenerateOptions::default()
            },
            grammar,
            tools,
            echoed: match form {
                Form::Responses => responses::echoed(&fields),
                Form::Chat | Form::Completion => Map::new(),
            },
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            speech,
            shows_tokens,
            stream,
            include_usage: include_usage.unwrap_or(false),
            trace,
        })
    }
}

/// The model that a request names, if it names one, is the one served.
pub(super) fn check_model(fields: &Fields<'_>, service: &Service) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(asked) if asked != service.name => Err(ApiError::no_model(asked, &[&service.name])),
        _ => Ok(()),
    }
}

/// The messages of a chat.
pub(super) fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    let list = fields.list("messages")?.unwrap_or_default();
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` has no message"));
    }
    let read = |(i, message)| {
        Message::from_json(message)
            .map_err(|e| ApiError::invalid(format!("messages[{i}]"), format!("`messages[{i}]`: {e}")))
    };
    list.iter().enumerate().map(read).collect()
}

/// What the template gets besides the messages.
pub(super) fn render_options(fields: &Fields<'_>, tools: Option<Value>) -> Result<RenderOptions, ApiError> {
    let kwargs = match fields.object("chat_template_kwargs", "chat_template_kwargs.")? {
        None => Map::new(),
        Some(kwargs) => kwargs.entries().map(|(name, value)| (name.clone(), value.clone())).collect(),
    };
    // A conversation is answered today.
    let now = i64::try_from(crate::unix_s()).ok();
    Ok(RenderOptions { kwargs, now, tools, ..RenderOptions::default() })
}

/// Refusals of tokenizer and template are the request's fault.
pub(super) fn text_error(error: TextError) -> ApiError {
    let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    ApiError::invalid("messages", format!("{error}{hint}"))
}

/// Messages to the ids of a prompt.
pub(super) fn chat_ids(
    fields: &Fields<'_>,
    service: &Service,
    add_generation_prompt: bool,
) -> Result<Vec<u32>, ApiError> {
    let messages = messages(fields)?;
    let tools = Wanted::read(fields, Form::Chat, service)?.shown;
    let options = render_options(fields, tools)?.with_generation_prompt(add_generation_prompt);
    ids_of(&messages, &options, service)
}

/// Messages to the ids of a prompt.
fn ids_of(messages: &[Message], options: &RenderOptions, service: &Service) -> Result<Vec<u32>, ApiError> {
    let text = service.template()?.render(messages, options).map_err(text_error)?;
    // The template writes its own BOS.
    service.tokenizer.encode(&text, false).map_err(text_error)
}

/// A text is continued, not answered: nobody is called.
fn no_tools(fields: &Fields<'_>) -> Result<(), ApiError> {
    match fields.list("tools")? {
        Some(list) if !list.is_empty() => {
            Err(ApiError::unsupported("tools", "ask at /v1/chat/completions, or at /v1/responses"))
        }
        _ => Ok(()),
    }
}

/// What is to be continued.
struct Prompt<'a> {
    ids: Vec<u32>,
    /// As it was asked, if that was a text.
    text: Option<&'a str>,
}

fn ids(list: &[Value], param: &str, vocab: usize) -> Result<Vec<u32>, ApiError> {
    let id = |value: &Value| value.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32);
    list.iter()
        .map(|value| {
            id(value).ok_or_else(|| {
                ApiError::invalid(param, format!("`{param}` has {value}, expected token ids below {vocab}"))
            })
        })
        .collect()
}

/// A text, ids, or a list of either.
fn prompts<'a>(fields: &Fields<'a>, service: &Service) -> Result<Vec<Prompt<'a>>, ApiError> {
    let wrong = |message: &str| ApiError::invalid("prompt", message);
    let one = |value: &'a Value| match value {
        Value::String(text) => {
            let ids = service.tokenizer.encode(text, true);
            let ids = ids.map_err(|e| ApiError::invalid("prompt", e.to_string()))?;
            Ok(Prompt { ids, text: Some(text) })
        }
        Value::Array(list) => Ok(Prompt { ids: ids(list, "prompt", service.vocab)?, text: None }),
        _ => Err(wrong("`prompt` is neither a text, nor token ids, nor a list of these")),
    };
    match fields.get("prompt") {
        None => Err(wrong("`prompt` is missing")),
        Some(Value::Array(list)) if !list.iter().all(Value::is_number) => {
            if list.len() > MOST_PROMPTS {
                return Err(wrong(&format!("`prompt` has {} prompts, at most {MOST_PROMPTS}", list.len())));
            }
            list.iter().map(one).collect()
        }
        Some(value) => Ok(vec![one(value)?]),
    }
}

fn max_tokens(
    fields: &Fields<'_>,
    form: Form,
    service: &Service,
    prompt: usize,
    default: usize,
) -> Result<usize, ApiError> {
    let room = service.context.saturating_sub(prompt);
    let new = "max_completion_tokens";
    let param = match form {
        Form::Responses => "max_output_tokens",
        Form::Chat if fields.get(new).is_some() => new,
        Form::Chat | Form::Completion => "max_tokens",
    };
    // A completion of no token shows the prompt, or scores it.
    let asked = fields.count(param, i64::from(form != Form::Completion)..=i64::from(u32::MAX))?;
    if let Some(asked) = asked.filter(|asked| *asked > room) {
        let message = format!(
            "the prompt has {prompt} tokens and `{param}` is {asked}, but the context of the model ends at {}",
            service.context
        );
        return Err(ApiError::too_long(param, message));
    }
    // A single sequence must fit in the cache, else it would wait for ever.
    let slots = service.cache_slots;
    let tokens = asked.unwrap_or_else(|| default.min(room).min(slots.saturating_sub(prompt)).max(1));
    if prompt + tokens > slots {
        let message =
            format!("prompt and answer need {} tokens of cache, and the server has {slots}", prompt + tokens);
        return Err(ApiError::too_long(param, message));
    }
    Ok(tokens)
}

fn logit_bias(fields: &Fields<'_>, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias", "logit_bias.")? else { return Ok(Vec::new()) };
    map.entries()
        .map(|(name, _)| {
            let id = name.parse::<u32>().ok().filter(|id| (*id as usize) < vocab).ok_or_else(|| {
                let message = format!("`logit_bias` has the key `{name}`, expected token ids below {vocab}");
                ApiError::invalid("logit_bias", message)
            })?;
            Ok((id, map.number(name, -100.0..=100.0)?.unwrap_or(0.0)))
        })
        .collect()
}

/// How many alternatives are wanted beside each token; `None` if no log-probabilities are.
fn logprobs(fields: &Fields<'_>, form: Form) -> Result<Option<usize>, ApiError> {
    match form {
        Form::Completion => fields.count("logprobs", 0..=MOST_LOGPROBS),
        Form::Responses => {
            let wanted = responses::includes_logprobs(fields)?;
            let top = fields.count("top_logprobs", 0..=MOST_LOGPROBS)?;
            Ok(wanted.then(|| top.unwrap_or(0)))
        }
        Form::Chat => {
            let wanted = fields.bool("logprobs")?.unwrap_or(false);
            let top = fields.count("top_logprobs", 0..=MOST_LOGPROBS)?;
            if top.is_some() && !wanted {
                return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`"));
            }
            Ok(wanted.then(|| top.unwrap_or(0)))
        }
    }
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let wrong = |message: String| ApiError::invalid("stop", message);
    let stops = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .map(|stop| stop.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| wrong("`stop` has an entry that is no text".into()))?,
        Some(_) => return Err(wrong("`stop` is neither a text nor a list of texts".into())),
    };
    if stops.len() > MOST_STOPS {
        return Err(wrong(format!("`stop` has {} texts, at most {MOST_STOPS}", stops.len())));
    }
    if stops.iter().any(String::is_empty) {
        return Err(wrong("`stop` has an empty text".into()));
    }
    Ok(stops)
}

/// What holds the answer to a schema.
fn grammar(schema: &Value, at: &str, service: &Service) -> Result<Arc<JsonGrammar>, ApiError> {
    let made = service.grammars.as_ref().map_err(Clone::clone).and_then(|made| made.json_schema(schema));
    made.map(Arc::new).map_err(|error| error.into_api_error(at))
}

/// Where the schema of an answer stands.
const FORMAT_AT: &str = "response_format.json_schema.schema";

/// The JSON schema that the answer is to follow, if one is asked for.
fn response_format(fields: &Fields<'_>) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.object("response_format", "response_format.")? else { return Ok(None) };
    match format.string("type")? {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(serde_json::json!({"type": "object"}))),
        Some("json_schema") => {
            let described = format.object("json_schema", "response_format.json_schema.")?;
            let schema = described.and_then(|described| described.get("schema")).ok_or_else(|| {
                let name = FORMAT_AT;
                ApiError::invalid(name, format!("`{name}` is missing"))
            })?;
            Ok(Some(schema.clone()))
        }
        other => {
            let name = "response_format.type";
            let found = other.map_or_else(|| "missing".to_string(), |other| format!("`{other}`"));
            let message = format!("`{name}` is {found}, expected `text`, `json_object` or `json_schema`");
            Err(ApiError::invalid(name, message))
        }
    }
}

/// Which draft tokens of this request are kept.
fn verify(ours: Option<Fields<'_>>, service: &Service) -> Result<VerifyRule, ApiError> {
    let name = "draftsmith.verify";
    let asked = ours.map(|ours| ours.string("verify")).transpose()?.flatten();
    asked.map_or(Ok(service.verify), |word| {
        word.parse::<VerifyRule>()
            .map_err(|wanted| ApiError::invalid(name, format!("`{name}` is `{word}`, {wanted}")))
    })
}

/// How much to draft for this request.
fn draft_plan(ours: Option<Fields<'_>>, service: &Service) -> Result<DraftPlan, ApiError> {
    let name = "draftsmith.draft";
    let Some(asked) = ours.and_then(|ours| ours.get("draft")) else {
        return Ok(service.plan(verify(ours, service)?));
    };
    let plan = match asked {
        Value::String(word) if word == "auto" => DraftPlan::Auto,
        Value::String(word) if word == "none" => DraftPlan::None,
        Value::Object(_) => {
            let fields = Fields::of(asked)?.below("draftsmith.draft.");
            if let Some(depth) = fields.count("chain", 1..=MOST_NODES)? {
                DraftPlan::Chain { depth }
            } else if let Some(tree) = fields.object("tree", "draftsmith.draft.tree.")? {
                let need = |field: &str| {
                    tree.count(field, 1..=MOST_NODES)?.ok_or_else(|| {
                        let name = tree.name(field);
                        ApiError::invalid(&name, format!("`{name}` is missing"))
                    })
                };
                DraftPlan::Tree {
                    depth: need("depth")?,
                    top_k: need("top_k")?,
                    num_draft_tokens: need("nodes")?,
                }
            } else {
                return Err(ApiError::invalid(name, format!("`{name}` has neither `chain` nor `tree`")));
            }
        }
        _ => {
            let message = format!("`{name}` is neither `auto`, nor `none`, nor a chain or tree");
            return Err(ApiError::invalid(name, message));
        }
    };
    if !matches!(plan, DraftPlan::Auto | DraftPlan::None) && service.board.draft().is_none() {
        return Err(ApiError::invalid(name, "no draft is loaded"));
    }
    Ok(plan)
}
