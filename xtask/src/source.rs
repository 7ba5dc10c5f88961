//! The text of a Rust file as far as names go: without comments and literals, and what is compiled for tests apart.
//!
//! Nothing is cut out, it is blanked: places and line numbers stay those of the file.

/// One file, in two parts of the same length.
pub(crate) struct Source {
    /// What is always compiled.
    pub(crate) code: String,
    /// What stands behind `#[cfg(test)]`.
    pub(crate) tests: String,
}

impl Source {
    pub(crate) fn of(text: &str) -> Source {
        let bare = bare(text);
        let mut ranges = Vec::new();
        let mut from = 0;
        while let Some(at) = bare[from..].find("#[cfg(").map(|at| from + at) {
            let condition = &bare[at + "#[cfg(".len()..];
            from = at + 1;
            if condition.starts_with("test)") || condition.starts_with("all(test") {
                from = item_end(&bare, at);
                ranges.push(at..from);
            }
        }
        let is_test = |at: usize| ranges.iter().any(|r| r.contains(&at));
        let part = |tests: bool| {
            let keep = |(at, c): (usize, char)| if c == '\n' || is_test(at) == tests { c } else { ' ' };
            bare.char_indices().map(keep).collect()
        };
        Source { code: part(false), tests: part(true) }
    }
}

/// Comments and the insides of literals as blanks, one ASCII character for each of the text's.
fn bare(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(chars.len());
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    let mut i = 0;
    while i < chars.len() {
        let before = if i == 0 { ' ' } else { at(i - 1) };
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => (i..chars.len()).find(|j| at(*j) == '\n').unwrap_or(chars.len()),
            ('/', '*') => {
                let (mut depth, mut j) = (1, i + 2);
                while j < chars.len() && depth > 0 {
                    match (at(j), at(j + 1)) {
                        ('/', '*') => (depth, j) = (depth + 1, j + 2),
                        ('*', '/') => (depth, j) = (depth - 1, j + 2),
                        _ => j += 1,
                    }
                }
                j
            }
            ('r', '"' | '#') if !is_word(before) || before == 'b' => {
                let hashes = (i + 1..chars.len()).take_while(|j| at(*j) == '#').count();
                if at(i + 1 + hashes) == '"' {
                    let closes = |j: &usize| at(*j) == '"' && (1..=hashes).all(|h| at(j + h) == '#');
                    let quote = (i + 2 + hashes..chars.len()).find(closes).unwrap_or(chars.len());
                    quote + 1 + hashes
                } else {
                    i
                }
            }
            ('"', _) => {
                let mut j = i + 1;
                while j < chars.len() && at(j) != '"' {
                    j += if at(j) == '\\' { 2 } else { 1 };
                }
                j + 1
            }
            // A character, not a lifetime.
            ('\'', '\\') => (i + 3..chars.len()).find(|j| at(*j) == '\'').unwrap_or(i) + 1,
            ('\'', _) if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end > i {
            chars[i..end.min(chars.len())].iter().for_each(|c| blank(&mut out, *c));
            i = end;
        } else {
            out.push(if at(i).is_ascii() { at(i) } else { '_' });
            i += 1;
        }
    }
    out
}

/// Where the item behind an attribute ends.
fn item_end(bare: &str, attribute: usize) -> usize {
    let bytes = bare.as_bytes();
    let mut at = attribute;
    loop {
        while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        match bytes.get(at) {
            Some(b'#') => at = closing(bytes, at + 1),
            _ => break,
        }
    }
    let is_use = ["use ", "pub use ", "pub(crate) use "].iter().any(|u| bare[at..].starts_with(u));
    while at < bytes.len() {
        match bytes[at] {
            b';' => return at + 1,
            b'{' if !is_use => return closing(bytes, at),
            b'{' | b'(' | b'[' => at = closing(bytes, at),
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Behind the bracket that closes the one here.
pub(crate) fn closing(bytes: &[u8], open: usize) -> usize {
    let mut depth = 0;
    for (i, b) in bytes.iter().enumerate().skip(open) {
        match b {
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return i + 1;
        }
    }
    bytes.len()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Where a name stands as a whole word.
pub(crate) fn words<'t>(text: &'t str, name: &'t str) -> impl Iterator<Item = usize> + 't {
    text.match_indices(name).map(|(at, _)| at).filter(move |at| {
        let before = text[..*at].chars().next_back();
        let after = text[at + name.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

/// True if a library is named: at the head of a path, or in a `use` of its own.
pub(crate) fn names_library(text: &str, library: &str) -> bool {
    words(text, library).any(|at| {
        let (before, after) = (text[..at].trim_end(), text[at + library.len()..].trim_start());
        // `a::b` is no library `b`; `::b` is.
        let is_inside =
            before.strip_suffix("::").is_some_and(|head| head.ends_with(|c: char| is_word(c) || c == '>'));
        let is_used = words(before, "use").last().is_some_and(|u| !before[u..].contains(';'));
        !is_inside && (after.starts_with("::") || is_used)
    })
}

/// The line of a place, counted from 1.
pub(crate) fn line(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanks_of_the_same_length() {
        let text = "a /* b /* c */ d */ e // f\n'g' '\\'' 'h: &'i \"j \\\" k\" r#\"l \" m\"# b\"n\" r#o";
        let out = bare(text);
        assert_eq!(out.len(), text.len());
        let left: Vec<&str> = out.split_whitespace().collect();
        assert_eq!(left, ["a", "e", "'h:", "&'i", "b", "r#o"]);
    }

    #[test]
    fn what_is_compiled_for_tests_stands_apart() {
        let source = Source::of(
            "use a::b;\n#[cfg(test)]\nuse c::{d, e};\n#[cfg(test)]\n#[allow(x)]\nmod t {\n fn f() { g::h(); }\n}\nfn i() { j::k(); }\n",
        );
        assert!(names_library(&source.code, "a") && names_library(&source.code, "j"));
        assert!(!names_library(&source.code, "c") && !names_library(&source.code, "g"));
        assert!(names_library(&source.tests, "c") && names_library(&source.tests, "g"));
        assert!(!names_library(&source.tests, "a") && !names_library(&source.tests, "j"));
        assert_eq!(source.code.len(), source.tests.len());
    }

    #[test]
    fn a_library_is_named_by_the_head_of_a_path() {
        for text in
            ["use zip;", "use zip as z;", "zip::Archive", "use {x, zip};", "#[zip::attr]", "<zip::A as B>"]
        {
            assert!(names_library(text, "zip"), "{text}");
        }
        for text in
            ["a.zip(b)", "crate::zip::A", "unzip::A", "let zip = 1;", "fn zip() {}", "std::iter::zip(a)"]
        {
            assert!(!names_library(text, "zip"), "{text}");
        }
    }
}
