use super::*;
use crate::atomic::small_disk;
use proptest::prelude::*;

const HIDDEN: usize = 40;

pub(super) fn spec(dtype: CaptureDtype, rows: u64) -> CacheSpec {
    let hash = |t: &str| crate::hash::sha256_hex(t);
    CacheSpec {
        target: "m.gguf".into(),
        target_sha256: hash("target"),
        precision: "stored".into(),
        tokenizer_sha256: hash("tokenizer"),
        template_sha256: hash("template"),
        tokens_sha256: hash("tokens"),
        target_layer_ids: vec![1, 2, 3],
        hidden_size: HIDDEN as u32,
        dtype,
        shard_rows: 3,
        rows,
    }
}

/// Values that repeat for the same seed, with an outlier as residual streams have them.
pub(super) fn row(seed: u64, tokens: usize) -> CaptureRow {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut values = |n: usize| -> Vec<f32> {
        let mut v: Vec<f32> = (0..n).map(|_| (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect();
        v[n / 3] = 900.0;
        v
    };
    let (features, last) = (values(tokens * 3 * HIDDEN), values(tokens * HIDDEN));
    CaptureRow {
        ids: (0..tokens as u32).map(|i| i * 7 + seed as u32).collect(),
        loss_mask: (0..tokens).map(|i| i % 3 == 1).collect(),
        features,
        last,
    }
}

pub(super) fn fill(dir: &Path, spec: &CacheSpec, until: u64) {
    let mut w = CacheWriter::open(dir, spec).unwrap();
    while w.rows_done() < until {
        w.push(&row(w.rows_done(), 2 + w.rows_done() as usize)).unwrap();
    }
}

pub(super) fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(p).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn bf16_rows_come_back_rounded_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(CaptureDtype::Bf16, 7);
    fill(dir.path(), &spec, 7);
    let cache = CacheReader::open_for(dir.path(), &spec).unwrap();
    cache.verify().unwrap();
    assert_eq!((cache.len(), cache.manifest().shards.len()), (7, 3));
    for i in [6, 0, 3, 5] {
        let (wanted, found) = (row(i as u64, 2 + i), cache.row(i).unwrap());
        assert_eq!(cache.row_tokens(i), found.len());
        assert_eq!((&found.ids, &found.loss_mask), (&wanted.ids, &wanted.loss_mask));
        let round = |v: &[f32]| v.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect::<Vec<_>>();
        assert_eq!((found.features, found.last), (round(&wanted.features), round(&wanted.last)));
    }
}

#[test]
fn int8_rows_are_within_half_a_step_of_their_block() {
    let spec = spec(CaptureDtype::Int8, 1);
    let wanted = row(5, 9);
    let found = wanted.stored_as(&spec).unwrap();
    let pairs = [(&wanted.features, &found.features), (&wanted.last, &found.last)];
    for (a, b) in pairs {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.chunks(HIDDEN).zip(b.chunks(HIDDEN)) {
            for (a, b) in a.chunks(codec::BLOCK).zip(b.chunks(codec::BLOCK)) {
                let max = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                // The scale is at most one bf16 step (2^-7) above max / 127.
                let step = max / 127.0 * (1.0 + 1.0 / 128.0);
                for (a, b) in a.iter().zip(b) {
                    assert!((a - b).abs() <= step * 0.5001, "{a} came back as {b}, step {step}");
                }
            }
        }
    }
    // The outlier coarsens its own block and no other: everything else keeps its sign and size.
    let coarse = wanted.features.iter().zip(&found.features).filter(|(a, b)| (*a - *b).abs() > 0.005).count();
    assert!(coarse <= codec::BLOCK, "{coarse} values lost their precision");
}

#[test]
fn a_cache_and_its_rounding_function_agree() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
        let (dir, spec) = (dir.path().join(format!("{dtype:?}")), spec(dtype, 4));
        fill(&dir, &spec, 4);
        let cache = CacheReader::open(&dir).unwrap();
        for i in 0..4 {
            assert_eq!(cache.row(i).unwrap(), row(i as u64, 2 + i).stored_as(&spec).unwrap());
        }
    }
}

#[test]
fn storing_bf16_twice_is_storing_it_once() {
    let spec = spec(CaptureDtype::Bf16, 1);
    let once = row(3, 5).stored_as(&spec).unwrap();
    assert_eq!(once, once.stored_as(&spec).unwrap());
}

#[test]
fn extreme_values_survive() {
    let mut r = row(1, 1);
    r.features[..6].copy_from_slice(&[0.0, -0.0, 1e-40, f32::MIN_POSITIVE, 3.3e38, -3.3e38]);
    r.features[32..40].fill(0.0);
    for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
        let back = r.stored_as(&spec(dtype, 1)).unwrap();
        assert!(back.features.iter().chain(&back.last).all(|v| v.is_finite()));
        assert!((back.features[4] / 3.3e38 - 1.0).abs() < 0.01);
        assert!(back.features[32..40].iter().all(|v| *v == 0.0));
    }
}

#[test]
fn the_bill_is_what_is_stored_before_compression() {
    for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
        for tokens in [1, 8, 13] {
            let raw = codec::encode(&row(1, tokens), &spec(dtype, 1)).unwrap();
            assert_eq!(estimate_bytes(tokens as u64, HIDDEN as u64, 3, dtype), raw.len() as u64);
        }
    }
    // SmolLM2-135M: 576 wide, three layers and the final state.
    assert_eq!(
        estimate_bytes(8_000_000, 576, 3, CaptureDtype::Int8),
        8_000_000 * (4 * (576 + 36) + 4) + 1_000_000
    );
    assert_eq!(estimate_bytes(u64::MAX, 1 << 40, 3, CaptureDtype::Bf16), u64::MAX);
}

#[test]
fn an_interrupted_cache_goes_on_and_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(CaptureDtype::Int8, 8);
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    fill(&whole, &spec, 8);
    // Stopped in the middle of shard 1, then of shard 2; each time only the open shard is lost.
    for (until, kept) in [(5, 3), (7, 6), (8, 8)] {
        fill(&parts, &spec, until);
        let w = CacheWriter::open(&parts, &spec).unwrap();
        assert_eq!((w.rows_done(), w.is_complete()), (kept, kept == 8));
        if kept < 8 {
            let err = CacheReader::open(&parts).unwrap_err();
            assert!(matches!(err, CacheError::Incomplete { done, rows: 8, .. } if done == kept), "{err}");
        }
    }
    assert_eq!(content(&whole), content(&parts));
    assert!(CacheWriter::open(&parts, &spec).unwrap().finish().is_ok());
}

#[test]
fn a_shard_without_manifest_entry_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(CaptureDtype::Int8, 6);
    fill(dir.path(), &spec, 3);
    // Killed between the rename of the shard and the manifest: the shard is there, the manifest does not know it.
    std::fs::write(dir.path().join(shard_name(1)), b"whatever").unwrap();
    std::fs::write(dir.path().join(".shard-00001.dscache.1-0.tmp"), b"half").unwrap();
    fill(dir.path(), &spec, 6);
    CacheReader::open(dir.path()).unwrap().verify().unwrap();
    assert_eq!(content(dir.path()).len(), 3);
}

#[test]
fn a_full_disk_keeps_finished_shards_and_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(CaptureDtype::Bf16, 9);
    fill(dir.path(), &spec, 3);
    let before = content(dir.path());
    let mut w = CacheWriter::open(dir.path(), &spec).unwrap();
    let err = small_disk::with(3000, || {
        loop {
            if let Err(e) = w.push(&row(w.rows_done(), 2 + w.rows_done() as usize)) {
                break e;
            }
        }
    });
    assert!(err.to_string().starts_with("no space left while writing `"), "{err}");
    assert!(err.to_string().contains(&shard_name(1)), "{err}");
    assert!(err.hint().unwrap().contains("run the same command again"));
    assert_eq!(w.rows_done(), 3);
    assert_eq!(content(dir.path()), before);
    // The same writer goes on once there is room.
    while w.rows_done() < 9 {
        w.push(&row(w.rows_done(), 2 + w.rows_done() as usize)).unwrap();
    }
    w.finish().unwrap();
    CacheReader::open(dir.path()).unwrap().verify().unwrap();
}

#[test]
fn a_cache_of_something_else_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mine = spec(CaptureDtype::Int8, 2);
    fill(dir.path(), &mine, 2);
    let check = |change: &dyn Fn(&mut CacheSpec), expected: &str| {
        let mut other = mine.clone();
        change(&mut other);
        for err in [
            CacheReader::open_for(dir.path(), &other).unwrap_err(),
            CacheWriter::open(dir.path(), &other).err().unwrap(),
        ] {
            let path = dir.path().display();
            assert_eq!(err.to_string(), format!("target cache `{path}` was captured with {expected}"));
            assert!(err.hint().is_some());
        }
    };
    let hash = crate::hash::sha256_hex("target");
    check(&|s| s.target_sha256 = "x".into(), &format!("target_sha256 = `{hash}`, but the run wants `x`"));
    check(
        &|s| s.target_layer_ids = vec![0, 1, 2],
        "target_layer_ids = `[1, 2, 3]`, but the run wants `[0, 1, 2]`",
    );
    check(&|s| s.dtype = CaptureDtype::Bf16, "dtype = `int8`, but the run wants `bf16`");
    check(&|s| s.rows = 3, "rows = `2`, but the run wants `3`");
    let mut renamed = mine.clone();
    renamed.target = "other/path.gguf".into();
    assert!(CacheReader::open_for(dir.path(), &renamed).is_ok());
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(CaptureDtype::Int8, 1);
    let mut w = CacheWriter::open(dir.path(), &spec).unwrap();
    let mut check = |change: &dyn Fn(&mut CaptureRow), expected: &str| {
        let mut bad = row(1, 4);
        change(&mut bad);
        let err = w.push(&bad).unwrap_err();
        assert_eq!(err.to_string(), format!("row 0 cannot be stored: {expected}"));
    };
    check(&|r| *r = CaptureRow::default(), "it has no tokens");
    check(&|r| r.loss_mask.truncate(1), "4 tokens but 1 mask entries");
    check(&|r| r.last.truncate(1), "it has 1 values of final states, expected 160 for 4 tokens");
    check(&|r| r.features.truncate(1), "it has 1 values of features, expected 480 for 4 tokens");
    check(&|r| r.features[130] = f32::NAN, "layer 1 of token 1 has a value that is not finite");
    check(&|r| r.last[41] = f32::INFINITY, "the final state of token 1 has a value that is not finite");
    w.push(&row(1, 4)).unwrap();
    let err = w.push(&row(1, 4)).unwrap_err();
    assert_eq!(err.to_string(), "row 1 cannot be stored: the cache is for 1 rows");
}

#[test]
fn broken_caches_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let said = |e: CacheError| e.to_string();
    assert!(said(CacheReader::open(dir.path()).unwrap_err()).contains("holds no target cache"));
    fill(dir.path(), &spec(CaptureDtype::Int8, 2), 2);
    let manifest = dir.path().join(MANIFEST_NAME);
    let good = std::fs::read_to_string(&manifest).unwrap();
    for (from, to, expected) in [
        ("draftsmith-target-cache", "other", "`format` is `other`"),
        ("\"version\": 1", "\"version\": 9", "format version 9"),
        ("shard-00000.dscache", "../../etc/passwd", "shard 0 is `../../etc/passwd`"),
        ("\"rows\": 2", "\"rows\": 3", ""),
        ("\"hidden_size\": 40", "\"hidden_size\": 0", "out of range"),
        ("\"complete\"", "\"komplett\"", "unknown field"),
    ] {
        std::fs::write(&manifest, good.replacen(from, to, 1)).unwrap();
        let err = said(CacheReader::open(dir.path()).unwrap_err());
        assert!(err.contains(expected), "{err}");
    }
    std::fs::write(&manifest, good).unwrap();
    let shard = dir.path().join(shard_name(0));
    std::fs::remove_file(&shard).unwrap();
    assert!(matches!(CacheReader::open(dir.path()), Err(CacheError::Open(_))));
}

#[test]
fn a_cut_or_changed_shard_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), &spec(CaptureDtype::Int8, 2), 2);
    let shard = dir.path().join(shard_name(0));
    let good = std::fs::read(&shard).unwrap();
    for len in 0..good.len() {
        std::fs::write(&shard, &good[..len]).unwrap();
        assert!(CacheReader::open(dir.path()).is_err(), "cut at {len}");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&shard, &bad).unwrap();
        assert!(CacheReader::open(dir.path()).and_then(|c| c.verify()).is_err(), "byte {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn damaged_shards_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), &spec(CaptureDtype::Int8, 2), 2);
        let shard = dir.path().join(shard_name(0));
        let mut bytes = std::fs::read(&shard).unwrap();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        std::fs::write(&shard, &bytes).unwrap();
        if let Ok(cache) = CacheReader::open(dir.path()) {
            for i in 0..cache.len() {
                let _ = cache.row(i);
            }
        }
    }
}
