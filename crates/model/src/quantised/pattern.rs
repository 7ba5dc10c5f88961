//! The patterns with which configurations name layers: the part of Python's regular expressions that they use.
//!
//! A pattern is asked one question, whether it matches from the start of a name on, so all ways through it are
//! followed at once: a set of positions goes in, the set of those where a match can end comes out. There is nothing
//! to try again, and the time is bounded by the lengths of pattern and name.

/// Longest pattern; names of layers are far shorter.
const LENGTH_MAX: usize = 2048;
/// Deepest nesting of groups.
const DEPTH_MAX: usize = 32;
/// Largest number of repetitions that `{m,n}` may ask for.
const REPEAT_MAX: u32 = 256;

/// A parsed pattern.
#[derive(Clone, Debug)]
pub(crate) struct Pattern(Node);

#[derive(Clone, Debug)]
enum Node {
    /// One character: in the ranges, or not in them.
    One {
        ranges: Vec<(char, char)>,
        not: bool,
    },
    Start,
    End,
    /// `\b`, or `\B` if `not`.
    Border {
        not: bool,
    },
    All(Vec<Node>),
    Any(Vec<Node>),
    Repeat {
        node: Box<Node>,
        min: u32,
        max: Option<u32>,
    },
    /// Looks ahead and stays.
    Ahead {
        node: Box<Node>,
        not: bool,
    },
}

/// Positions `0..=length` of a text.
type Positions = Vec<bool>;

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// What of it is not understood.
    pub(crate) fn parse(text: &str) -> Result<Pattern, String> {
        if text.len() > LENGTH_MAX {
            return Err(format!("it is longer than {LENGTH_MAX} bytes"));
        }
        let mut parser = Parser { chars: text.chars().collect(), at: 0 };
        let node = parser.choice(0)?;
        match parser.peek() {
            None => Ok(Pattern(node)),
            Some(c) => Err(format!("`{c}` stands alone")),
        }
    }

    /// Whether a match begins at the start of `name`, wherever it ends.
    pub(crate) fn matches(&self, name: &str) -> bool {
        !self.ends(name).is_empty()
    }

    /// Where matches from the start on can end, in characters.
    pub(crate) fn ends(&self, name: &str) -> Vec<usize> {
        let text: Vec<char> = name.chars().collect();
        let mut from = vec![false; text.len() + 1];
        from[0] = true;
        self.0.run(&text, &from).iter().enumerate().filter_map(|(i, on)| on.then_some(i)).collect()
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl Node {
    fn run(&self, text: &[char], from: &Positions) -> Positions {
        let keep = |test: &dyn Fn(usize) -> bool| -> Positions {
            from.iter().enumerate().map(|(i, on)| *on && test(i)).collect()
        };
        match self {
            Node::One { ranges, not } => {
                let mut to = vec![false; from.len()];
                for (i, c) in text.iter().enumerate() {
                    let inside = ranges.iter().any(|(a, b)| (a..=b).contains(&c));
                    to[i + 1] = from[i] && inside != *not;
                }
                to
            }
            Node::Start => keep(&|i| i == 0),
            Node::End => keep(&|i| i == text.len()),
            Node::Border { not } => keep(&|i| {
                let before = i > 0 && is_word(text[i - 1]);
                let behind = i < text.len() && is_word(text[i]);
                (before != behind) != *not
            }),
            Node::All(nodes) => nodes.iter().fold(from.clone(), |from, node| node.run(text, &from)),
            Node::Any(nodes) => {
                let mut to = vec![false; from.len()];
                for node in nodes {
                    to.iter_mut().zip(node.run(text, from)).for_each(|(to, on)| *to |= on);
                }
                to
            }
            Node::Repeat { node, min, max } => {
                let mut last = from.clone();
                for _ in 0..*min {
                    last = node.run(text, &last);
                }
                let mut to = last.clone();
                // Beyond the length of the text no round finds anything new.
                let rounds = max.map_or(text.len() as u32, |max| max - min);
                for _ in 0..rounds {
                    last = node.run(text, &last);
                    let fresh = to.iter().zip(&last).any(|(to, on)| *on && !to);
                    to.iter_mut().zip(&last).for_each(|(to, on)| *to |= on);
                    if !fresh {
                        break;
                    }
                }
                to
            }
            Node::Ahead { node, not } => keep(&|i| {
                let mut one = vec![false; from.len()];
                one[i] = true;
                node.run(text, &one).contains(&true) != *not
            }),
        }
    }
}

struct Parser {
    chars: Vec<char>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn take(&mut self, wanted: &str) -> bool {
        let found = wanted.chars().enumerate().all(|(i, c)| self.chars.get(self.at + i) == Some(&c));
        if found {
            self.at += wanted.chars().count();
        }
        found
    }

    fn next(&mut self, what: &str) -> Result<char, String> {
        let c = self.peek().ok_or_else(|| format!("it ends inside {what}"))?;
        self.at += 1;
        Ok(c)
    }

    fn choice(&mut self, depth: usize) -> Result<Node, String> {
        if depth > DEPTH_MAX {
            return Err(format!("its groups are more than {DEPTH_MAX} deep"));
        }
        let mut ways = Vec::new();
        loop {
            let mut nodes = Vec::new();
            while self.peek().is_some_and(|c| c != '|' && c != ')') {
                let node = self.atom(depth)?;
                nodes.push(self.repeated(node)?);
            }
            ways.push(Node::All(nodes));
            if !self.take("|") {
                break;
            }
        }
        Ok(Node::Any(ways))
    }

    fn atom(&mut self, depth: usize) -> Result<Node, String> {
        match self.next("it")? {
            '.' => Ok(Node::One { ranges: vec![('\n', '\n')], not: true }),
            '^' => Ok(Node::Start),
            '$' => Ok(Node::End),
            '[' => self.class(),
            '(' => {
                let ahead = match (self.take("?="), self.take("?!")) {
                    (true, _) => Some(false),
                    (_, true) => Some(true),
                    _ => None,
                };
                if ahead.is_none() && !self.take("?:") && self.peek() == Some('?') {
                    return Err("groups with `(?` other than `(?:`, `(?=` and `(?!` are not read".into());
                }
                let inner = self.choice(depth + 1)?;
                if !self.take(")") {
                    return Err("a `(` has no `)`".into());
                }
                Ok(match ahead {
                    Some(not) => Node::Ahead { node: Box::new(inner), not },
                    None => inner,
                })
            }
            '\\' => match self.next("an escape")? {
                'b' => Ok(Node::Border { not: false }),
                'B' => Ok(Node::Border { not: true }),
                'A' => Ok(Node::Start),
                'Z' => Ok(Node::End),
                c => self.escape(c).map(|(ranges, not)| Node::One { ranges, not }),
            },
            c @ ('*' | '+' | '?') => Err(format!("`{c}` has nothing to repeat")),
            c => Ok(Node::One { ranges: vec![(c, c)], not: false }),
        }
    }

    fn escape(&self, c: char) -> Result<(Vec<(char, char)>, bool), String> {
        let (digit, space) = (vec![('0', '9')], vec![(' ', ' '), ('\t', '\r')]);
        let word = vec![('0', '9'), ('a', 'z'), ('A', 'Z'), ('_', '_')];
        Ok(match c {
            'd' => (digit, false),
            'D' => (digit, true),
            'w' => (word, false),
            'W' => (word, true),
            's' => (space, false),
            'S' => (space, true),
            'n' => (vec![('\n', '\n')], false),
            't' => (vec![('\t', '\t')], false),
            c if c.is_ascii_alphanumeric() => return Err(format!("`\\{c}` is not read")),
            c => (vec![(c, c)], false),
        })
    }

    fn class(&mut self) -> Result<Node, String> {
        let not = self.take("^");
        let mut ranges = Vec::new();
        loop {
            let c = match self.next("a `[`")? {
                ']' if !ranges.is_empty() => break,
                '\\' => {
                    let c = self.next("an escape")?;
                    match self.escape(c)? {
                        (found, false) if found.len() == 1 && found[0].0 == found[0].1 => found[0].0,
                        (found, false) => {
                            ranges.extend(found);
                            continue;
                        }
                        (_, true) => return Err(format!("`\\{c}` in `[]` is not read")),
                    }
                }
                c => c,
            };
            let range = self.peek() == Some('-') && self.chars.get(self.at + 1).is_some_and(|c| *c != ']');
            if !range {
                ranges.push((c, c));
                continue;
            }
            self.at += 1;
            let last = match self.next("a range")? {
                '\\' => self.next("an escape")?,
                last => last,
            };
            if last < c {
                return Err(format!("the range `{c}-{last}` is empty"));
            }
            ranges.push((c, last));
        }
        Ok(Node::One { ranges, not })
    }

    fn repeated(&mut self, node: Node) -> Result<Node, String> {
        let (min, max) = match self.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                let close = self.chars[self.at..].iter().position(|c| *c == '}');
                let inner: String = match close {
                    Some(len) => self.chars[self.at + 1..self.at + len].iter().collect(),
                    None => return Err("a `{` has no `}`".into()),
                };
                let number = |text: &str| {
                    let n = text.parse::<u32>().ok().filter(|n| *n <= REPEAT_MAX);
                    n.ok_or_else(|| format!("`{{{inner}}}` is not read"))
                };
                let found = match inner.split_once(',') {
                    None => (number(&inner)?, Some(number(&inner)?)),
                    Some((min, max)) => (
                        if min.is_empty() { 0 } else { number(min)? },
                        if max.is_empty() { None } else { Some(number(max)?) },
                    ),
                };
                self.at += close.unwrap_or(0);
                found
            }
            _ => return Ok(node),
        };
        self.at += 1;
        if max.is_some_and(|max| max < min) {
            return Err("a repetition ends before it begins".into());
        }
        // Greedy or not is the same question.
        self.take("?");
        if matches!(self.peek(), Some('*' | '+' | '?' | '{')) {
            return Err("a repetition is repeated".into());
        }
        Ok(Node::Repeat { node: Box::new(node), min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wanted values are those of Python's `re.match`.
    #[test]
    fn patterns_match_as_in_python() {
        for (pattern, name, wanted) in [
            ("", "x", true),
            (".*lm_head", "model.lm_head", true),
            ("lm_head", "model.lm_head", false),
            ("model", "model.layers", true),
            (r".*mlp\.gate$", "model.layers.3.mlp.gate", true),
            (r".*mlp\.gate$", "model.layers.3.mlp.gate_proj", false),
            (r"^model\.layers\.(0|1[0-9])\.", "model.layers.17.mlp", true),
            (r"^model\.layers\.(0|1[0-9])\.", "model.layers.1.mlp", false),
            (r".*layers\.\d+\.self_attn\.[qkv]_proj", "model.layers.12.self_attn.v_proj", true),
            (r".*layers\.\d+\.self_attn\.[^qk]_proj", "model.layers.12.self_attn.q_proj", false),
            ("(?:a|b)+c", "abbac", true),
            ("(?:a|b)+c", "c", false),
            ("(a*)*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac", false),
            ("a{2,3}b", "aab", true),
            ("a{2,3}b", "ab", false),
            ("a{2}b", "aaab", false),
            ("a{,2}$", "aa", true),
            ("a??b", "ab", true),
            (r"x\b", "x.y", true),
            (r"x\b", "xy", false),
            ("(?!.*k_proj).*proj", "a.q_proj", true),
            ("(?!.*k_proj).*proj", "a.k_proj", false),
            ("a(?=b)b", "ab", true),
            (r"[\w.]+$", "a.b_1", true),
            ("[]a]+$", "]a", true),
            ("[a-]+$", "a-", true),
        ] {
            assert_eq!(Pattern::parse(pattern).unwrap().matches(name), wanted, "{pattern} on {name}");
        }
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for (pattern, wanted) in [
            ("(a", "a `(` has no `)`"),
            ("a)", "`)` stands alone"),
            ("*a", "`*` has nothing to repeat"),
            ("(?<=a)b", "other than"),
            ("[a", "ends inside a `[`"),
            ("a{1", "a `{` has no `}`"),
            ("a{x}", "`{x}` is not read"),
            ("a{3,1}", "ends before it begins"),
            ("a**", "a repetition is repeated"),
            (r"\q", r"`\q` is not read"),
            ("[z-a]", "is empty"),
            ("a\\", "ends inside an escape"),
        ] {
            let said = Pattern::parse(pattern).unwrap_err();
            assert!(said.contains(wanted), "{pattern}: {said}");
        }
        assert!(Pattern::parse(&"(".repeat(100)).unwrap_err().contains("deep"));
        assert!(Pattern::parse(&"a".repeat(3000)).unwrap_err().contains("longer"));
    }
}
