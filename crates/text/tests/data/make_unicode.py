"""Writes src/jinja/unicode.rs: the classes of characters that Python's string methods know.

    python3 make_unicode.py > ../../src/jinja/unicode.rs
"""
import sys
import unicodedata

ALL = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]


def ranges(test):
    out, start, last = [], None, None
    for c in ALL:
        i = ord(c)
        if test(c):
            if start is None:
                start = i
            elif i != last + 1 and not (last == 0xD7FF and i == 0xE000):
                out.append((start, last))
                start = i
            last = i
        elif start is not None:
            out.append((start, last))
            start = None
    if start is not None:
        out.append((start, last))
    return out


def table(name, doc, test):
    print(f"/// {doc}\n#[rustfmt::skip]\nstatic {name}: &[(u32, u32)] = &[")
    line = ""
    for a, b in ranges(test):
        item = f"(0x{a:x}, 0x{b:x}), "
        if len(line) + len(item) > 108:
            print("    " + line.rstrip())
            line = ""
        line += item
    print("    " + line.rstrip() + "\n];\n")


def mapping(name, doc, pairs):
    print(f"/// {doc}\n#[rustfmt::skip]\nstatic {name}: &[(char, &str)] = &[")
    line = ""
    for c, text in pairs:
        escaped = "".join(f"\\u{{{ord(x):x}}}" for x in text)
        item = f"('\\u{{{ord(c):x}}}', \"{escaped}\"), "
        if len(line) + len(item) > 108:
            print("    " + line.rstrip())
            line = ""
        line += item
    print("    " + line.rstrip() + "\n];\n")


print(f'''//! Classes of characters as Python's string methods know them (Unicode {unicodedata.unidata_version}).
//!
//! Made by `tests/data/make_unicode.py`.

fn within(table: &[(u32, u32)], c: char) -> bool {{
    let code = u32::from(c);
    let at = table.partition_point(|(_, end)| *end < code);
    table.get(at).is_some_and(|(start, _)| *start <= code)
}}

fn mapped(table: &[(char, &'static str)], c: char) -> Option<&'static str> {{
    table.binary_search_by_key(&c, |(c, _)| *c).ok().map(|i| table[i].1)
}}

/// `str.isspace` of one character, and what `\\\\s` matches.
pub(super) fn space(c: char) -> bool {{
    match u32::from(c) {{
        0x9..=0xd | 0x1c..=0x20 | 0x85 | 0xa0 => true,
        0..=0x9f => false,
        code => matches!(code, 0x1680 | 0x2000..=0x200a | 0x2028 | 0x2029 | 0x202f | 0x205f | 0x3000),
    }}
}}

/// `str.isprintable`: written as it is by `repr`.
pub(super) fn printable(c: char) -> bool {{
    !within(UNPRINTABLE, c)
}}

/// `str.isalpha`.
pub(super) fn alpha(c: char) -> bool {{
    if c.is_ascii() {{ c.is_ascii_alphabetic() }} else {{ within(ALPHA, c) }}
}}

/// `str.isdecimal`.
pub(super) fn decimal(c: char) -> bool {{
    if c.is_ascii() {{ c.is_ascii_digit() }} else {{ within(DECIMAL, c) }}
}}

/// The value of a decimal digit of any script: each script has its ten in a row.
pub(super) fn decimal_value(c: char) -> Option<u32> {{
    if c.is_ascii() {{
        return c.to_digit(10);
    }}
    let code = u32::from(c);
    let at = DECIMAL.partition_point(|(_, end)| *end < code);
    DECIMAL.get(at).filter(|(start, _)| *start <= code).map(|(start, _)| (code - start) % 10)
}}

/// `str.isdigit`.
pub(super) fn digit(c: char) -> bool {{
    if c.is_ascii() {{ c.is_ascii_digit() }} else {{ within(DIGIT, c) }}
}}

/// `str.isnumeric`.
pub(super) fn numeric(c: char) -> bool {{
    if c.is_ascii() {{ c.is_ascii_digit() }} else {{ within(NUMERIC, c) }}
}}

/// `str.isalnum`; with `_` what `\\\\w` matches.
pub(super) fn word(c: char) -> bool {{
    if c.is_ascii() {{ c.is_ascii_alphanumeric() }} else {{ within(ALPHA, c) || within(NUMERIC, c) }}
}}

/// `str.isidentifier` of a text of word characters.
pub(super) fn identifier(text: &str) -> bool {{
    text.chars().next().is_some_and(|c| c == '_' || alpha(c))
}}

/// Upper case at the start of a word.
pub(super) fn push_title(c: char, out: &mut String) {{
    match mapped(TITLE, c) {{
        Some(text) => out.push_str(text),
        None => out.extend(c.to_uppercase()),
    }}
}}

/// `str.casefold` of one character.
pub(super) fn push_folded(c: char, out: &mut String) {{
    match mapped(FOLDED, c) {{
        Some(text) => out.push_str(text),
        None => out.extend(c.to_lowercase()),
    }}
}}

/// Characters between lower and upper case.
pub(super) fn title_cased(c: char) -> bool {{
    within(TITLE_CASED, c)
}}
'''.replace("\\\\\\\\", "\\\\"))
cat = unicodedata.category
table("UNPRINTABLE", "Not written as they are.", lambda c: not c.isprintable())
table("ALPHA", "Letters beyond ASCII.", lambda c: ord(c) > 127 and c.isalpha())
table("DECIMAL", "Decimal digits beyond ASCII.", lambda c: ord(c) > 127 and c.isdecimal())
table("DIGIT", "Digits beyond ASCII.", lambda c: ord(c) > 127 and c.isdigit())
table("NUMERIC", "Numbers beyond ASCII.", lambda c: ord(c) > 127 and c.isnumeric())
table("TITLE_CASED", "Characters in title case.", lambda c: cat(c) == "Lt")
mapping("TITLE", "Title case where it is not upper case.",
        [(c, c.title()) for c in ALL if c.title() != c.upper()])
mapping("FOLDED", "Folded case where it is not lower case.",
        [(c, c.casefold()) for c in ALL if c.casefold() != c.lower()])
