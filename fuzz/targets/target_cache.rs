//! Any bytes as a part of a target cache, by how they begin: a shard, row places, kept rows, else a manifest. An error, or rows of the
//! tokens that were promised.

#![no_main]

use std::path::Path;

use draftsmith_formats::cache::{
    CacheManifest, CacheSpec, CaptureDtype, KeptKey, KeptRows, RowPlaces, ShardEntry, decode_frame,
};
use draftsmith_formats::hash::sha256_hex;

const SHARD: &[u8] = include_bytes!("../seeds/target_cache/shard.bin");
const KEPT: &[u8] = include_bytes!("../seeds/target_cache/kept.bin");

/// The rows of the seeds, their ids and loss mask.
const ROWS: [(&[u32], &[bool]); 2] = [(&[5, 6], &[false, true]), (&[7, 8, 9], &[true, false, true])];

fn spec() -> CacheSpec {
    CacheSpec {
        target: String::new(),
        target_sha256: "a".into(),
        precision: "stored".into(),
        tokenizer_sha256: "b".into(),
        template_sha256: "c".into(),
        tokens_sha256: String::new(),
        target_layer_ids: vec![0, 2],
        hidden_size: 4,
        dtype: CaptureDtype::Int8,
        shard_rows: 1,
        rows: 0,
    }
}

fn entry(bytes: usize) -> ShardEntry {
    ShardEntry {
        file: "shard-00000.dscache".into(),
        rows: 2,
        tokens: 5,
        trained_tokens: 3,
        bytes: bytes as u64,
        sha256: String::new(),
        rows_sha256: None,
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let spec = spec();
    if bytes.starts_with(b"DSCACHE1") {
        let Ok(places) = RowPlaces::of_shard(bytes, &entry(bytes.len()), &spec) else { return };
        let (mut tokens, mut decoded) = (0, 0);
        for (place, _) in &places.rows {
            let frame = &bytes[place.offset as usize..place.end() as usize];
            tokens += u64::from(place.tokens);
            if let Ok(row) = decode_frame(frame, place.tokens as usize, &spec) {
                let n = place.tokens as usize;
                decoded += 1;
                assert_eq!((row.len(), row.loss_mask.len()), (n, n));
                assert_eq!((row.features.len(), row.last.len()), (n * 8, n * 4));
            }
        }
        assert_eq!(tokens, 5);
        assert!(decoded == 2 || bytes != SHARD, "the seed is not whole");
        let again = RowPlaces::parse(&places.to_bytes(), &entry(bytes.len()), &spec);
        assert_eq!(again.unwrap(), places);
        // The same shard as an earlier cache, hashed as it is.
        let dir = std::env::temp_dir().join(format!("fuzz-earlier-{}", std::process::id()));
        let spec = CacheSpec { shard_rows: 2, rows: 2, ..spec };
        let shard = ShardEntry { sha256: sha256_hex(bytes), ..entry(bytes.len()) };
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(&shard.file), bytes).unwrap();
        std::fs::write(dir.join("manifest.json"), CacheManifest::begin(&spec).with(shard).to_text()).unwrap();
        let keys = ROWS.iter().map(|(ids, mask)| KeptKey::of(ids, mask));
        let rows = KeptRows::open(Path::new("none"), &[dir], &spec, keys);
        for (number, (ids, _)) in ROWS.iter().enumerate() {
            match rows.get(number as u64) {
                Some(row) => assert_eq!(row.tokens(), ids.len() as u64),
                None => assert!(bytes != SHARD, "the seed is not found"),
            }
        }
    } else if bytes.starts_with(b"DSROWS01") {
        if let Ok(places) = RowPlaces::parse(bytes, &entry(180), &spec) {
            assert_eq!(places.to_bytes(), bytes);
        }
    } else if bytes.starts_with(b"DSKEPT01") {
        let dir = std::env::temp_dir().join(format!("fuzz-kept-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("kept-0000-00000.dskept"), bytes).unwrap();
        let rows = KeptRows::open(&dir, &[], &spec, ROWS.iter().map(|(ids, mask)| KeptKey::of(ids, mask)));
        for (number, (ids, _)) in ROWS.iter().enumerate() {
            match rows.get(number as u64) {
                Some(row) => assert_eq!(row.tokens(), ids.len() as u64),
                None => assert!(bytes != KEPT, "the seed is not whole"),
            }
        }
    } else if let Ok(manifest) = CacheManifest::parse(bytes, Path::new("fuzz.json")) {
        let again = CacheManifest::parse(manifest.to_text().as_bytes(), Path::new("fuzz.json"));
        assert_eq!(again.unwrap(), manifest);
    }
});
