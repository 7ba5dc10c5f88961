//! Where the rows of a shard lie, so that one of them can be fetched and checked without the others.
//!
//! ```text
//! file of row places:  magic "DSROWS01" · per row  offset u64 · length u32 · tokens u32 · sha256 of the frame (32 bytes)
//! ```

use std::io::Read;

use super::{CacheError, CacheSpec, CaptureRow, INDEX_ENTRY, MAGIC, ShardEntry, TRAILER, codec};
use crate::hash::Hasher;

const ROWS_MAGIC: &[u8; 8] = b"DSROWS01";

/// Bytes per row of a file of row places.
const ROWS_ENTRY: usize = 48;

/// Where a row's frame lies in its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPlace {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Tokens of the row.
    pub tokens: u32,
}

/// The row places of one shard, and the hash of each row's frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowPlaces {
    /// In the order of the rows.
    pub rows: Vec<(RowPlace, [u8; 32])>,
}

impl RowPlaces {
    /// Those of a whole shard.
    ///
    /// # Errors
    /// The shard is not as its entry says, in words.
    pub fn of_shard(bytes: &[u8], entry: &ShardEntry, spec: &CacheSpec) -> Result<RowPlaces, String> {
        let places = places_in(bytes, entry, spec)?;
        let row = |place: RowPlace| {
            let at = place.offset as usize;
            (place, RowPlaces::hash(&bytes[at..at + place.len as usize]))
        };
        Ok(RowPlaces { rows: places.into_iter().map(row).collect() })
    }

    /// The hash of a frame.
    pub fn hash(frame: &[u8]) -> [u8; 32] {
        let mut hasher = Hasher::default();
        hasher.update(frame);
        hasher.finish_bytes()
    }

    /// As they are written beside the shard.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ROWS_MAGIC.len() + self.rows.len() * ROWS_ENTRY);
        out.extend_from_slice(ROWS_MAGIC);
        for (place, hash) in &self.rows {
            out.extend_from_slice(&place.offset.to_le_bytes());
            out.extend_from_slice(&place.len.to_le_bytes());
            out.extend_from_slice(&place.tokens.to_le_bytes());
            out.extend_from_slice(hash);
        }
        out
    }

    /// Reads what [`RowPlaces::to_bytes`] wrote; the places must tile the shard of the entry.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(bytes: &[u8], entry: &ShardEntry, spec: &CacheSpec) -> Result<RowPlaces, String> {
        let body = bytes.strip_prefix(ROWS_MAGIC).ok_or("it does not begin as row places do")?;
        let wanted = entry.rows.checked_mul(ROWS_ENTRY as u64);
        if wanted != Some(body.len() as u64) {
            return Err(format!("it has {} bytes, which {} rows do not need", bytes.len(), entry.rows));
        }
        let rows: Vec<(RowPlace, [u8; 32])> = body
            .chunks_exact(ROWS_ENTRY)
            .map(|row| {
                let (offset, len, tokens) = (u64_at(row, 0), u32_at(row, 8), u32_at(row, 12));
                let hash: [u8; 32] = row[16..].try_into().expect("an entry ends with 32 bytes");
                (RowPlace { offset, len, tokens }, hash)
            })
            .collect();
        let end = (entry.bytes as usize).checked_sub(rows.len() * INDEX_ENTRY + TRAILER);
        let end = end.ok_or("the shard has no room for its rows")?;
        check_tiles(rows.iter().map(|(place, _)| *place), end, entry, spec)?;
        Ok(RowPlaces { rows })
    }
}

/// A row from its frame.
///
/// # Errors
/// The frame does not decode to so many tokens, in words.
pub fn decode_frame(frame: &[u8], tokens: usize, spec: &CacheSpec) -> Result<CaptureRow, String> {
    let expected = codec::encoded_len(tokens, spec).ok_or("its size overflows")?;
    codec::decode(&unpack(frame, expected.saturating_add(1))?, tokens, spec)
}

/// Ids and loss mask of a row from the beginning of its frame, `[S]` each; its states are not looked at.
pub(super) fn ids_and_mask(
    frame: &[u8],
    tokens: usize,
    spec: &CacheSpec,
) -> Result<(Vec<u32>, Vec<bool>), String> {
    // A row of so many tokens can be held at all, so its head can.
    codec::encoded_len(tokens, spec).ok_or("its size overflows")?;
    let head = codec::head_len(tokens);
    let raw = unpack(frame, head)?;
    match raw.len() == head {
        true => codec::decode_head(&raw, tokens),
        false => Err(format!("{tokens} tokens do not fit a frame of {} bytes", raw.len())),
    }
}

/// What a frame holds, at most `limit` bytes from the first on.
fn unpack(frame: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(|e| e.to_string())?;
    // Grown as data comes: the index may lie about the number of tokens.
    let mut raw = Vec::with_capacity(limit.min(frame.len().saturating_mul(8)));
    decoder.take(limit as u64).read_to_end(&mut raw).map_err(|e| e.to_string())?;
    Ok(raw)
}

impl RowPlace {
    /// The byte behind the last.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Checks a shard against its manifest entry and returns its rows, which must tile it.
pub(super) fn places_in(bytes: &[u8], entry: &ShardEntry, spec: &CacheSpec) -> Result<Vec<RowPlace>, String> {
    let len = bytes.len();
    if len as u64 != entry.bytes {
        return Err(format!("it has {len} bytes, the manifest says {}", entry.bytes));
    }
    if len < MAGIC.len() + TRAILER || !bytes.starts_with(MAGIC) || !bytes.ends_with(MAGIC) {
        return Err("it does not begin and end as a shard does".to_string());
    }
    let (index_at, rows) = (u64_at(bytes, len - TRAILER), u64_at(bytes, len - TRAILER + 8));
    let index_end = rows.checked_mul(INDEX_ENTRY as u64).and_then(|n| n.checked_add(index_at));
    if rows != entry.rows || index_end != Some((len - TRAILER) as u64) {
        return Err(format!("an index of {rows} rows at byte {index_at} does not end at the trailer"));
    }
    let place = |i: usize| {
        let at = index_at as usize + i * INDEX_ENTRY;
        RowPlace { offset: u64_at(bytes, at), len: u32_at(bytes, at + 8), tokens: u32_at(bytes, at + 12) }
    };
    let places: Vec<RowPlace> = (0..rows as usize).map(place).collect();
    check_tiles(places.iter().copied(), index_at as usize, entry, spec)?;
    Ok(places)
}

/// Rows follow each other from the magic to the index, and have the tokens of the entry.
fn check_tiles(
    places: impl Iterator<Item = RowPlace>,
    index_at: usize,
    entry: &ShardEntry,
    spec: &CacheSpec,
) -> Result<(), String> {
    let (mut at, mut tokens) = (MAGIC.len(), 0u64);
    for (i, row) in places.enumerate() {
        if row.offset != at as u64 || index_at.checked_sub(at).is_none_or(|room| row.len as usize > room) {
            return Err(format!("row {i} does not begin where the one before it ends"));
        }
        if row.tokens == 0 || codec::encoded_len(row.tokens as usize, spec).is_none() {
            return Err(format!("row {i} says that it has {} tokens", row.tokens));
        }
        at += row.len as usize;
        tokens += u64::from(row.tokens);
    }
    if at != index_at {
        return Err(format!("the last row ends at byte {at}, the index begins at {index_at}"));
    }
    if tokens != entry.tokens {
        return Err(format!("it has {tokens} tokens, the manifest says {}", entry.tokens));
    }
    Ok(())
}

impl ShardEntry {
    /// What is wrong with the shard as an error that names it; `folder` is where it lies.
    pub fn damaged(&self, folder: &str, problem: String) -> CacheError {
        CacheError::Damaged { path: format!("{folder}/{}", self.file).into(), problem }
    }
}
