//! `draftsmith data preview` and `draftsmith data render`.

use std::io::IsTerminal;

use draftsmith::Error;
use draftsmith::cli;
use draftsmith::data::{
    Paint, ReadOptions, Row, SourceReader, mask_row, preview_conversation, preview_notes,
};
use draftsmith::elsewhere::{Outside, data_error, open_source};
use draftsmith::engine::locate;
use draftsmith::formats::bundle_files::is_address;
use draftsmith::target::TargetText;
use draftsmith::text::{ChatTemplate, MaskOptions, Message, RenderOptions, TextError};

use super::Session;
use crate::failure::Failure;
use crate::printer;

pub(crate) fn preview(args: &cli::DataPreview, session: &Session) -> Result<u8, Failure> {
    // A wrong file is told before a model is fetched.
    let name = args.file.to_string_lossy();
    let mut reader = match is_address(&name) {
        true => {
            let env = session.env();
            let outside = Outside { places: env.places, stop: env.stop, variable: env.variable };
            let (file, _) = open_source(&name, &outside)?;
            SourceReader::open_ranged(&args.file, file, ReadOptions::default())
        }
        false => SourceReader::open(&args.file, ReadOptions::default()),
    }
    .map_err(data_error)?;
    let pulled =
        locate(std::slice::from_ref(&args.target), None, &session.places, &session.printer, &session.stop)?;
    let text = TargetText::open(&pulled.path, args.template.as_deref()).map_err(Error::from)?;
    let template = text.template().map_err(Error::from)?;
    let mut number = 0;
    let mut shown = 0;
    let paint = if std::io::stdout().is_terminal() { Paint::Ansi } else { Paint::Plain };
    while shown < args.rows {
        let Some((location, row)) = reader.next_row().map_err(data_error)? else { break };
        number += 1;
        if number < args.row {
            continue;
        }
        shown += 1;
        let problem = |problem| draftsmith::data::DataError::BadRow { location: location.clone(), problem };
        let row = row.map_err(|p| Error::from(problem(p)))?;
        let Row::Conversation(row) = row else {
            return Err(Failure::input(
                format!("{location}: the row is tokens already"),
                Some("there is nothing to render: its `loss_mask` says what is trained".to_string()),
            ));
        };
        let options = MaskOptions::default();
        let notes = reader.notes().clone();
        let failed =
            |source| Error::from(draftsmith::data::DataError::Text { location: location.clone(), source });
        if args.json {
            let answers = mask_row(&text.tokenizer, template, &row, &options).map_err(failed)?;
            let changes = notes.changes.union(&answers.not_rendered);
            let changes: Vec<&str> = changes.map(|change| change.name()).collect();
            for masked in answers.rows {
                let mask: Vec<u8> = masked.loss_mask.iter().map(|m| u8::from(*m)).collect();
                printer::json(&serde_json::json!({
                    "row": number,
                    "text": masked.text,
                    "ids": masked.ids,
                    "loss_mask": mask,
                    "changes": changes,
                    "unused_keys": notes.unused_keys,
                    "answers_not_trained": answers.not_trained,
                    "messages_left_out": answers.left_out,
                }))?;
            }
        } else {
            let page =
                preview_conversation(&text.tokenizer, template, &row, &options, paint).map_err(failed)?;
            let notes = preview_notes(&notes);
            printer::out(&format!("── {location}\n{}\n{notes}", page.trim_end()))?;
        }
    }
    if shown == 0 {
        return Err(Failure::input(
            format!("`{}` has {number} rows, row {} was asked for", args.file.display(), args.row),
            Some("give a smaller `--row`; blank lines do not count".to_string()),
        ));
    }
    Ok(0)
}

pub(crate) fn render(args: &cli::DataRender, session: &Session) -> Result<u8, Failure> {
    let bytes = draftsmith::formats::atomic::read(&args.file).map_err(Error::from)?;
    let pulled =
        locate(std::slice::from_ref(&args.target), None, &session.places, &session.printer, &session.stop)?;
    let text = TargetText::open(&pulled.path, args.template.as_deref()).map_err(Error::from)?;
    let lines = String::from_utf8_lossy(&bytes);
    for (i, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = i + 1;
        let bad = |what: String| {
            Failure::input(
                format!("`{}`, line {number}: {what}", args.file.display()),
                Some(
                    "give each line an object with `messages`, a list of `{\"role\", \"content\"}`"
                        .to_string(),
                ),
            )
        };
        let row: serde_json::Value = serde_json::from_str(line).map_err(|e| bad(format!("no JSON: {e}")))?;
        let messages = row.get("messages").and_then(serde_json::Value::as_array);
        let messages: Vec<Message> = messages
            .ok_or_else(|| bad("`messages` is missing or no list".to_string()))?
            .iter()
            .map(Message::from_json)
            .collect::<Result<_, _>>()
            .map_err(|e| bad(e.to_string()))?;
        let options = RenderOptions {
            add_generation_prompt: row
                .get("add_generation_prompt")
                .and_then(|v| v.as_bool())
                .unwrap_or(false),
            tools: row.get("tools").filter(|v| !v.is_null()).cloned(),
            kwargs: row.get("chat_template_kwargs").and_then(|v| v.as_object()).cloned().unwrap_or_default(),
            now: row.get("now").and_then(serde_json::Value::as_i64),
        };
        let rendered = match row.get("template").and_then(serde_json::Value::as_str) {
            Some(source) => ChatTemplate::parse(source)
                .map(|template| template.with_tokens_of(&text.tokenizer))
                .and_then(|template| template.render(&messages, &options)),
            None => text.template().map_err(Error::from)?.render(&messages, &options),
        };
        let with_ids = rendered.and_then(|t| Ok::<_, TextError>((text.tokenizer.encode(&t, false)?, t)));
        if args.json {
            printer::json(&match with_ids {
                Ok((ids, text)) => serde_json::json!({"row": number, "text": text, "ids": ids}),
                Err(error) => serde_json::json!({"row": number, "error": error.to_string()}),
            })?;
        } else {
            let shown = match with_ids {
                Ok((_, text)) => text,
                Err(error) => format!("error: {error}"),
            };
            printer::out(&format!("── `{}`, line {number}\n{shown}\n", args.file.display()))?;
        }
    }
    Ok(0)
}
