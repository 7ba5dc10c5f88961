//! A row for the eye: the rendered text with what is trained marked.

use draftsmith_text::{ChatTemplate, MaskOptions, MaskedRow, TextError, Tokenizer};

use crate::{Conversation, RowNotes, mask_row};

/// How trained text is marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Paint {
    /// `⟦trained⟧`, for files and pipes.
    #[default]
    Plain,
    /// Colours of a terminal: trained text green, control tokens dim.
    Ansi,
}

const GREEN: &str = "\x1b[32m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// Renders, tokenises and masks a conversation and shows the rows that come of it.
///
/// # Errors
/// Those of [`mask_conversation`].
pub fn preview_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    conversation: &Conversation,
    options: &MaskOptions,
    paint: Paint,
) -> Result<String, TextError> {
    let answers = mask_row(tokenizer, template, conversation, options)?;
    let rows = answers.rows;
    if rows.is_empty() {
        let why =
            if conversation.has_answer() { "no answer is to be trained" } else { "no assistant message" };
        let options = conversation.mask_options(options).render.with_generation_prompt(true);
        let text = template.render(&conversation.messages, &options)?;
        let tokens = tokenizer.encode(&text, false)?.len();
        return Ok(format!("{tokens} tokens, 0 trained ({why})\n{}\n", visible(&text)));
    }
    let mut out = rows.iter().map(|row| preview(row, tokenizer, paint)).collect::<Vec<_>>().join("\n");
    if answers.not_trained > 0 {
        out.push_str(&format!(
            "answers that are not trained, as their message says: {}\n",
            answers.not_trained
        ));
    }
    for change in &answers.not_rendered {
        out.push_str(&format!("an answer loses what the template leaves out: {}\n", change.name()));
    }
    if answers.left_out > 0 {
        out.push_str(&format!("messages behind the last answer, left out: {}\n", answers.left_out));
    }
    Ok(out)
}

/// What was changed in a row and which of its keys nobody read, one line each; empty if there is nothing to say.
pub fn preview_notes(notes: &RowNotes) -> String {
    let mut out = String::new();
    if !notes.changes.is_empty() {
        let names: Vec<&str> = notes.changes.iter().map(|change| change.name()).collect();
        out.push_str(&format!("changed: {}\n", names.join(", ")));
    }
    if !notes.unused_keys.is_empty() {
        out.push_str(&format!("keys nobody used: {}\n", visible(&notes.unused_keys.join(", "))));
    }
    out
}

/// Shows one row.
pub fn preview(row: &MaskedRow, tokenizer: &Tokenizer, paint: Paint) -> String {
    let mut out = format!("{} tokens, {} trained", row.ids.len(), row.trained_tokens());
    if let Some(split) = row.split {
        out.push_str(&format!("; own row: {split}"));
    }
    for turn in row.turns.iter().filter(|turn| !turn.ends_turn) {
        out.push_str(&format!("; message {} has no end-of-turn token", turn.message));
    }
    out.push('\n');
    // Runs of tokens of one kind; a character that two tokens share belongs to the first.
    let kind = |i: usize| (row.loss_mask[i], tokenizer.is_special(row.ids[i]));
    let mut at = 0;
    let mut written = 0;
    while at < row.ids.len() {
        let mut end = at + 1;
        while end < row.ids.len() && kind(end) == kind(at) {
            end += 1;
        }
        let mut stop = row.spans[end - 1].end.max(written);
        while !row.text.is_char_boundary(stop) {
            stop += 1;
        }
        let text = visible(&row.text[written..stop]);
        let (trained, special) = kind(at);
        let opens = trained && (at == 0 || !row.loss_mask[at - 1]);
        let closes = trained && (end == row.ids.len() || !row.loss_mask[end]);
        match paint {
            Paint::Plain => {
                out.push_str(if opens { "⟦" } else { "" });
                out.push_str(&text);
                out.push_str(if closes { "⟧" } else { "" });
            }
            Paint::Ansi => {
                out.push_str(if trained { GREEN } else { "" });
                out.push_str(if special { DIM } else { "" });
                out.push_str(&text);
                out.push_str(if trained || special { RESET } else { "" });
            }
        }
        written = stop;
        at = end;
    }
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out
}

/// Control characters as their escapes: a row must not drive the terminal.
fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}
