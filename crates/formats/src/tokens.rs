//! The packed token file: a prepared corpus, row by row, with random access.
//!
//! ```text
//! magic "DSTOKENS" · version u32 · length of meta u32 · rows u64 · tokens u64 · trained tokens u64 ·
//! offset of index u64 · content hash [32] · meta (JSON object of strings)
//! rows:  id length u32 · domain length u32 · tokens S u32 · id · domain · token ids S·u32 · mask ⌈S/8⌉ bytes
//! index: per row  offset u64 · tokens u32 · trained tokens u32
//! ```
//! All numbers are little-endian; mask bit `i` is bit `i % 8` of byte `i / 8`, spare bits are 0. The content hash
//! covers ids, domains, tokens and masks of all rows in order, not the layout, so it names the corpus.
//!
//! Invariant: once a [`TokenFile`] is open, every row lies inside the file, the index agrees with the rows, and the
//! counts of the header agree with both. The content hash is compared by [`TokenFile::verify`].
//!
//! Shape legend: `S` tokens of one row.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::atomic::{AtomicError, AtomicFile};
use crate::hash::Hasher;
use crate::mapped::{Mapped, OpenError};

const MAGIC: &[u8; 8] = b"DSTOKENS";

/// Newest version that this code reads and writes.
pub const TOKENS_VERSION: u32 = 1;

/// Bytes before the meta text.
const HEAD: usize = 8 + 4 + 4 + 8 + 8 + 8 + 8 + 32;

/// Bytes per row of the index.
const INDEX_ENTRY: usize = 16;

/// Bytes of a row before its id.
const ROW_HEAD: usize = 12;

/// What is wrong with a token file.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] AtomicError),
    /// The file is no token file.
    #[error("`{}` is not a token file", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// A version from the future.
    #[error("token file `{}` has format version {found}, this program reads up to {newest}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Newest version that is known.
        newest: u32,
    },
    /// The file is cut off or damaged.
    #[error("token file `{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        problem: String,
    },
    /// A row that cannot be stored.
    #[error("row `{id}` has {problem}")]
    Row {
        /// Its id.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl TokensError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            TokensError::Write(e) => e.hint(),
            TokensError::Version { .. } => Some("update draftsmith".to_string()),
            TokensError::Magic { .. } | TokensError::Damaged { .. } => {
                Some("delete it and prepare the data again".to_string())
            }
            TokensError::Open(_) | TokensError::Row { .. } => None,
        }
    }
}

/// One row of a corpus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRow {
    /// Where it comes from, for people.
    pub id: String,
    /// Kind of text, such as `math`; may be empty.
    pub domain: String,
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` true where the token is trained.
    pub loss_mask: Vec<bool>,
}

impl TokenRow {
    /// Tokens with loss.
    pub fn trained_tokens(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }
}

/// What a token file holds in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSummary {
    /// Rows.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens with loss.
    pub trained_tokens: u64,
    /// Content hash, 64 hex digits.
    pub sha256: String,
}

/// Mask bits, lowest first.
pub(crate) fn pack_bits(mask: &[bool]) -> Vec<u8> {
    mask.chunks(8).map(|c| c.iter().enumerate().fold(0, |byte, (i, m)| byte | u8::from(*m) << i)).collect()
}

/// The first `len` bits, or `None` if `bytes` has another length or spare bits are set.
pub(crate) fn unpack_bits(bytes: &[u8], len: usize) -> Option<Vec<bool>> {
    if bytes.len() != len.div_ceil(8) {
        return None;
    }
    let spare = bytes.len() * 8 - len;
    if spare > 0 && bytes.last().is_some_and(|b| b >> (8 - spare) != 0) {
        return None;
    }
    Some((0..len).map(|i| bytes[i / 8] >> (i % 8) & 1 == 1).collect())
}

/// Writes a token file row by row; it appears under its name at [`TokenWriter::finish`].
pub struct TokenWriter {
    file: AtomicFile,
    meta: String,
    at: u64,
    index: Vec<u8>,
    summary: TokenSummary,
    hasher: Hasher,
}

impl TokenWriter {
    /// Starts a file. `meta` holds what the rows depend on, such as hashes of tokenizer and template.
    pub fn create(
        path: impl AsRef<Path>,
        meta: &BTreeMap<String, String>,
    ) -> Result<TokenWriter, TokensError> {
        let mut file = AtomicFile::create(path)?;
        let meta = serde_json::to_string(meta).expect("a map of strings is JSON");
        let start = [&[0; HEAD], meta.as_bytes()].concat();
        file.write_all(&start).map_err(|e| file.error(e))?;
        Ok(TokenWriter {
            file,
            meta,
            at: start.len() as u64,
            index: Vec::new(),
            summary: TokenSummary::default(),
            hasher: Hasher::default(),
        })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`TokensError::Row`] if ids and mask differ in length or the row has no tokens.
    pub fn push(&mut self, row: &TokenRow) -> Result<(), TokensError> {
        let refuse = |problem: String| TokensError::Row { id: row.id.clone(), problem };
        if row.ids.len() != row.loss_mask.len() {
            return Err(refuse(format!("{} tokens but {} mask entries", row.ids.len(), row.loss_mask.len())));
        }
        if row.ids.is_empty() {
            return Err(refuse("no tokens".to_string()));
        }
        let len = |n: usize, what: &str| u32::try_from(n).map_err(|_| refuse(format!("a too long {what}")));
        let (id_len, domain_len) = (len(row.id.len(), "id")?, len(row.domain.len(), "domain")?);
        let tokens = len(row.ids.len(), "list of tokens")?;
        let trained = row.trained_tokens();
        let mut bytes = Vec::with_capacity(ROW_HEAD + row.ids.len() * 5);
        for n in [id_len, domain_len, tokens] {
            bytes.extend_from_slice(&n.to_le_bytes());
        }
        bytes.extend_from_slice(row.id.as_bytes());
        bytes.extend_from_slice(row.domain.as_bytes());
        row.ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
        bytes.extend_from_slice(&pack_bits(&row.loss_mask));
        self.file.write_all(&bytes).map_err(|e| self.file.error(e))?;
        self.hasher.update(&bytes);
        self.index.extend_from_slice(&self.at.to_le_bytes());
        self.index.extend_from_slice(&tokens.to_le_bytes());
        self.index.extend_from_slice(&(trained as u32).to_le_bytes());
        self.at += bytes.len() as u64;
        self.summary.rows += 1;
        self.summary.tokens += u64::from(tokens);
        self.summary.trained_tokens += trained as u64;
        Ok(())
    }

    /// What was pushed so far; the hash is still empty.
    pub fn summary(&self) -> &TokenSummary {
        &self.summary
    }

    /// Completes the file and gives it its name.
    pub fn finish(mut self) -> Result<TokenSummary, TokensError> {
        self.summary.sha256 = self.hasher.finish();
        let s = &self.summary;
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&TOKENS_VERSION.to_le_bytes());
        head.extend_from_slice(&(self.meta.len() as u32).to_le_bytes());
        for n in [s.rows, s.tokens, s.trained_tokens, self.at] {
            head.extend_from_slice(&n.to_le_bytes());
        }
        head.extend_from_slice(&from_hex(&s.sha256));
        let file = &mut self.file;
        let written = file
            .write_all(&self.index)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(&head));
        written.map_err(|e| file.error(e))?;
        self.file.commit()?;
        Ok(self.summary)
    }
}

fn from_hex(hex: &str) -> Vec<u8> {
    let nibble = |c: u8| (c as char).to_digit(16).expect("hashes are hex") as u8;
    hex.as_bytes().chunks_exact(2).map(|c| nibble(c[0]) << 4 | nibble(c[1])).collect()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// An open token file.
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: PathBuf,
    bytes: Mapped,
    summary: TokenSummary,
    meta: BTreeMap<String, String>,
    index_at: usize,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl TokenFile {
    /// Opens a file and checks its structure completely.
    pub fn open(path: impl AsRef<Path>) -> Result<TokenFile, TokensError> {
        let path = path.as_ref();
        TokenFile::check(path, Mapped::open(path)?)
    }

    /// Like [`TokenFile::open`] for bytes that are in memory; `path` is for errors.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<TokenFile, TokensError> {
        TokenFile::check(path.as_ref(), bytes.into())
    }

    fn check(path: &Path, bytes: Mapped) -> Result<TokenFile, TokensError> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err(TokensError::Magic { path: path.to_path_buf() });
        }
        let damaged = |problem: String| TokensError::Damaged { path: path.to_path_buf(), problem };
        if bytes.len() < HEAD {
            return Err(damaged(format!("the header needs {HEAD} bytes, the file has {}", bytes.len())));
        }
        let version = u32_at(&bytes, 8);
        if version == 0 || version > TOKENS_VERSION {
            let path = path.to_path_buf();
            return Err(TokensError::Version { path, found: version, newest: TOKENS_VERSION });
        }
        let meta_end = HEAD + u32_at(&bytes, 12) as usize;
        let (rows, tokens, trained) = (u64_at(&bytes, 16), u64_at(&bytes, 24), u64_at(&bytes, 32));
        let index_at = u64_at(&bytes, 40);
        let meta = bytes.get(HEAD..meta_end).and_then(|m| serde_json::from_slice(m).ok());
        let meta = meta.ok_or_else(|| damaged("its description is no JSON object of strings".to_string()))?;
        let index_len = rows.checked_mul(INDEX_ENTRY as u64);
        let end = index_len.and_then(|n| n.checked_add(index_at));
        if end != Some(bytes.len() as u64) || index_at < meta_end as u64 {
            return Err(damaged(format!(
                "an index of {rows} rows at byte {index_at} does not end where the file ends ({} bytes)",
                bytes.len()
            )));
        }
        let summary =
            TokenSummary { rows, tokens, trained_tokens: trained, sha256: to_hex(&bytes[48..HEAD]) };
        let file = TokenFile { path: path.to_path_buf(), bytes, summary, meta, index_at: index_at as usize };
        file.check_rows(meta_end).map_err(damaged)?;
        Ok(file)
    }

    /// Rows must tile the space between meta and index, and agree with index and header.
    fn check_rows(&self, start: usize) -> Result<(), String> {
        let mut at = start;
        let (mut tokens, mut trained) = (0u64, 0u64);
        for i in 0..self.len() {
            let (offset, _, _) = self.index_entry(i);
            if offset != at as u64 {
                return Err(format!("row {i} is indexed at byte {offset}, the one before it ends at {at}"));
            }
            let (row, end) = self.decode(i, at)?;
            at = end;
            tokens += row.ids.len() as u64;
            trained += row.trained_tokens() as u64;
        }
        if at != self.index_at {
            return Err(format!("the last row ends at byte {at}, the index begins at {}", self.index_at));
        }
        if (tokens, trained) != (self.summary.tokens, self.summary.trained_tokens) {
            return Err("the counts of the header differ from those of the rows".to_string());
        }
        Ok(())
    }

    fn index_entry(&self, i: usize) -> (u64, u32, u32) {
        let at = self.index_at + i * INDEX_ENTRY;
        (u64_at(&self.bytes, at), u32_at(&self.bytes, at + 8), u32_at(&self.bytes, at + 12))
    }

    /// The row at a byte, and where it ends.
    fn decode(&self, i: usize, at: usize) -> Result<(TokenRow, usize), String> {
        let rows = &self.bytes[..self.index_at];
        let cut = || format!("row {i} at byte {at} runs into the index");
        let head = rows.get(at..).and_then(|r| r.get(..ROW_HEAD)).ok_or_else(cut)?;
        let (id_len, domain_len) = (u32_at(head, 0) as usize, u32_at(head, 4) as usize);
        let tokens = u32_at(head, 8) as usize;
        let mut next = at + ROW_HEAD;
        let mut take = |len: Option<usize>| {
            let end =
                len.and_then(|n| next.checked_add(n)).filter(|end| *end <= rows.len()).ok_or_else(cut)?;
            let slice = &rows[next..end];
            next = end;
            Ok::<_, String>(slice)
        };
        let (id, domain) = (take(Some(id_len))?, take(Some(domain_len))?);
        let ids = take(tokens.checked_mul(4))?;
        let mask = take(Some(tokens.div_ceil(8)))?;
        let text = |bytes: &[u8]| {
            std::str::from_utf8(bytes)
                .map(str::to_string)
                .map_err(|_| format!("the id of row {i} is not UTF-8"))
        };
        let row = TokenRow {
            id: text(id)?,
            domain: text(domain)?,
            ids: ids.chunks_exact(4).map(|c| u32_at(c, 0)).collect(),
            loss_mask: unpack_bits(mask, tokens)
                .ok_or_else(|| format!("the mask of row {i} has spare bits"))?,
        };
        let (_, index_tokens, index_trained) = self.index_entry(i);
        if tokens == 0 || index_tokens as usize != tokens || index_trained as usize != row.trained_tokens() {
            return Err(format!("the counts of row {i} differ from those of the index"));
        }
        Ok((row, next))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Counts and content hash.
    pub fn summary(&self) -> &TokenSummary {
        &self.summary
    }

    /// What the rows depend on.
    pub fn meta(&self) -> &BTreeMap<String, String> {
        &self.meta
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.summary.rows as usize
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens and trained tokens of a row, without reading it.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_counts(&self, i: usize) -> (usize, usize) {
        assert!(i < self.len(), "row {i} of {}", self.len());
        let (_, tokens, trained) = self.index_entry(i);
        (tokens as usize, trained as usize)
    }

    /// A row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, i: usize) -> TokenRow {
        assert!(i < self.len(), "row {i} of {}", self.len());
        let (offset, _, _) = self.index_entry(i);
        self.decode(i, offset as usize).expect("all rows were decoded when the file was opened").0
    }

    /// All rows in order.
    pub fn rows(&self) -> impl Iterator<Item = TokenRow> + '_ {
        (0..self.len()).map(|i| self.row(i))
    }

    /// Compares the content hash.
    pub fn verify(&self) -> Result<(), TokensError> {
        let start = if self.is_empty() { self.index_at } else { self.index_entry(0).0 as usize };
        let found = crate::hash::sha256_hex(&self.bytes[start..self.index_at]);
        if found == self.summary.sha256 {
            return Ok(());
        }
        let problem = format!("its rows hash to {found}, the header says {}", self.summary.sha256);
        Err(TokensError::Damaged { path: self.path.clone(), problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows() -> Vec<TokenRow> {
        let row = |id: &str, domain: &str, ids: Vec<u32>, mask: Vec<bool>| TokenRow {
            id: id.into(),
            domain: domain.into(),
            ids,
            loss_mask: mask,
        };
        vec![
            row("a", "math", (0..9).collect(), (0..9).map(|i| i % 3 == 0).collect()),
            row("ü", "", vec![u32::MAX], vec![false]),
            row("", "code", vec![1, 2, 3, 4, 5, 6, 7, 8], vec![true; 8]),
        ]
    }

    fn write(path: &Path) -> TokenSummary {
        let meta = BTreeMap::from([("tokenizer".to_string(), "abc".to_string())]);
        let mut w = TokenWriter::create(path, &meta).unwrap();
        for row in rows() {
            w.push(&row).unwrap();
        }
        w.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.tokens");
        let summary = write(&path);
        assert_eq!((summary.rows, summary.tokens, summary.trained_tokens), (3, 18, 11));
        let file = TokenFile::open(&path).unwrap();
        file.verify().unwrap();
        assert_eq!(file.summary(), &summary);
        assert_eq!(file.meta()["tokenizer"], "abc");
        assert_eq!(file.rows().collect::<Vec<_>>(), rows());
        assert_eq!(file.row(1), rows()[1]);
        assert_eq!(file.row_counts(0), (9, 3));
    }

    #[test]
    fn the_content_hash_depends_on_rows_alone() {
        let dir = tempfile::tempdir().unwrap();
        let one = write(&dir.path().join("a"));
        let mut w = TokenWriter::create(dir.path().join("b"), &BTreeMap::new()).unwrap();
        rows().iter().for_each(|r| w.push(r).unwrap());
        assert_eq!(w.finish().unwrap(), one);
        let mut w = TokenWriter::create(dir.path().join("b"), &BTreeMap::new()).unwrap();
        rows().iter().rev().for_each(|r| w.push(r).unwrap());
        assert_ne!(w.finish().unwrap().sha256, one.sha256);
    }

    #[test]
    fn an_empty_corpus_is_a_file_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        TokenWriter::create(&path, &BTreeMap::new()).unwrap().finish().unwrap();
        let file = TokenFile::open(&path).unwrap();
        file.verify().unwrap();
        assert!(file.is_empty() && file.rows().next().is_none());
    }

    #[test]
    fn an_unfinished_file_never_appears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let mut w = TokenWriter::create(&path, &BTreeMap::new()).unwrap();
        w.push(&rows()[0]).unwrap();
        drop(w);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn rows_that_make_no_sense_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = TokenWriter::create(dir.path().join("t"), &BTreeMap::new()).unwrap();
        let bad = TokenRow { id: "x".into(), ids: vec![1, 2], loss_mask: vec![true], ..Default::default() };
        assert_eq!(w.push(&bad).unwrap_err().to_string(), "row `x` has 2 tokens but 1 mask entries");
        let empty = TokenRow { id: "x".into(), ..Default::default() };
        assert_eq!(w.push(&empty).unwrap_err().to_string(), "row `x` has no tokens");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        write(&path);
        let bytes = std::fs::read(&path).unwrap();
        let cut = dir.path().join("cut");
        for len in 0..bytes.len() {
            std::fs::write(&cut, &bytes[..len]).unwrap();
            assert!(TokenFile::open(&cut).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        let meta = HEAD..HEAD + u32_at(&good, 12) as usize;
        for at in (0..good.len()).filter(|at| !meta.contains(at)) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x41;
            std::fs::write(&path, &bytes).unwrap();
            assert!(TokenFile::open(&path).and_then(|f| f.verify()).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_rows_round_trip(
            rows in prop::collection::vec(("[a-zü]{0,5}", "[a-z]{0,3}", prop::collection::vec((any::<u32>(), any::<bool>()), 1..40)), 0..8)
        ) {
            let rows: Vec<TokenRow> = rows
                .into_iter()
                .map(|(id, domain, tokens)| {
                    let (ids, loss_mask) = tokens.into_iter().unzip();
                    TokenRow { id, domain, ids, loss_mask }
                })
                .collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("t");
            let mut w = TokenWriter::create(&path, &BTreeMap::new()).unwrap();
            rows.iter().for_each(|r| w.push(r).unwrap());
            w.finish().unwrap();
            let file = TokenFile::open(&path).unwrap();
            file.verify().unwrap();
            prop_assert_eq!(file.rows().collect::<Vec<_>>(), rows);
        }

        #[test]
        fn damaged_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("t");
            write(&path);
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(file) = TokenFile::open(&path) {
                prop_assert_eq!(file.rows().count(), file.len());
            }
        }
    }
}
