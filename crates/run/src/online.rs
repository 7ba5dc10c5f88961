//! Rows that are captured when training asks for them, rounded as a cache would have rounded them: online and offline training agree
//! bit for bit.
//!
//! Through the host rows come from any source ([`OnlineRows`]). Where target and training share a card their states stay in its memory
//! ([`CardRows`]): the host sends token ids, and reads back whether the states can be trained on.

use std::ops::ControlFlow;

use draftsmith_capture::{CaptureSource, InProcess, TokenRow};
use draftsmith_cuda::{Buf, Cuda, KeptAs, Launcher, UnfitState};
use draftsmith_formats::cache::{CacheSpec, CaptureDtype, CaptureRow};
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::Memory;
use draftsmith_train::{DeviceStates, Pack, PackShape, RowStore, TrainError};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A row as sources take it.
pub(crate) fn token_row(tokens: &TokenFile, number: usize) -> TokenRow {
    let row = tokens.row(number);
    TokenRow { number: number as u64, ids: row.ids.to_vec(), loss_mask: row.loss_mask.to_vec() }
}

/// Rows of a source, as they would come back from a cache.
pub(crate) struct OnlineRows<S> {
    pub(crate) tokens: TokenFile,
    pub(crate) source: S,
    pub(crate) spec: CacheSpec,
}

impl<S: CaptureSource> RowStore for OnlineRows<S> {
    fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.tokens.row_counts(row).0
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, BoxError> {
        let mut out = Vec::with_capacity(rows.len());
        let mut wanted = rows.iter();
        let mut next = || wanted.next().map(|n| token_row(&self.tokens, *n));
        self.source.capture_rows(&mut next, &mut |row| {
            out.push(row.stored_as(&self.spec));
            ControlFlow::Continue(())
        })?;
        if out.len() < rows.len() {
            return Err("interrupted".into());
        }
        Ok(out.into_iter().collect::<Result<_, _>>()?)
    }
}

/// Rows of a target on the card that trains. Read one by one they come through the host; a pack is filled where it is used.
pub(crate) struct CardRows<L: Launcher> {
    /// The way through the host.
    rows: OnlineRows<InProcess<Cuda<L>>>,
    cuda: Cuda<L>,
}

impl<L: Launcher> CardRows<L> {
    /// Rows of `target`, which lies on the card of `cuda` and captures the layers of `spec`.
    pub(crate) fn new(
        tokens: TokenFile,
        target: InProcess<Cuda<L>>,
        cuda: Cuda<L>,
        spec: CacheSpec,
    ) -> CardRows<L> {
        CardRows { rows: OnlineRows { tokens, source: target, spec }, cuda }
    }
}

impl<L: Launcher> RowStore for CardRows<L> {
    fn num_rows(&self) -> usize {
        self.rows.num_rows()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.rows.row_slots(row)
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, BoxError> {
        self.rows.read(rows)
    }

    fn fill(&mut self, rows: &[usize], shape: PackShape, pack: &mut Pack) -> Result<(), TrainError> {
        let OnlineRows { tokens, source: target, spec } = &self.rows;
        let width = spec.hidden_size as usize;
        let joined = spec.target_layer_ids.len() * width;
        for (what, found, wanted) in [
            ("feature values a token", joined, shape.feature_width),
            ("final hidden values a token", width, shape.last_width),
        ] {
            if let Some(row) = rows.first().filter(|_| found != wanted) {
                return Err(TrainError::RowShape { row: *row as u64, what, found, wanted });
            }
        }
        assert!(pack.is_empty(), "a pack is filled once");
        // What a row is cut by does not change the states before it.
        let cut = |number: &usize| {
            let mut row = token_row(tokens, *number);
            row.ids.truncate(shape.row_slots);
            row.loss_mask.truncate(shape.row_slots);
            row
        };
        let rows: Vec<TokenRow> = rows.iter().map(cut).collect();
        rows.iter().for_each(|row| pack.push_tokens(row.number, &row.ids, &row.loss_mask));
        let kept = match spec.dtype {
            CaptureDtype::Bf16 => KeptAs::Bf16,
            CaptureDtype::Int8 => KeptAs::Int8,
        };
        let (mut features, mut last) =
            (self.cuda.scratch(pack.len() * joined), self.cuda.scratch(pack.len() * width));
        let (mut first, mut unfit) = (0, None);
        let ran = target.steps(&rows, &mut |output, parts| {
            if unfit.is_some() {
                return;
            }
            let layers = output.hidden.iter().map(|layer| &layer.buf);
            let states: Vec<&Buf<L>> = layers.chain([&output.last.buf]).collect();
            let step = (output.last.rows, width);
            let kept = self.cuda.keep_states(&states, step, kept, (&mut features, &mut last), first);
            first += output.last.rows;
            if let Err(UnfitState { row, state }) = kept {
                // Rows of the step are the tokens of its parts, one after the other.
                let tokens = parts.iter().flat_map(|(i, part)| part.clone().map(move |token| (*i, token)));
                let (i, token) = { tokens }.nth(row).expect("a row of the step");
                unfit = Some(spec.unfit_state(rows[i].number, token, state));
            }
        });
        ran.map_err(|source| TrainError::Rows { source: source.into() })?;
        if let Some(error) = unfit {
            return Err(TrainError::Rows { source: error.into() });
        }
        pack.on_device = Some(DeviceStates::new::<Cuda<L>>(features, last));
        Ok(())
    }
}

#[cfg(all(test, feature = "cuda-shim"))]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use draftsmith_core::{LayerId, VocabMap};
    use draftsmith_cuda::CudaOptions;
    use draftsmith_cuda::shim::Shim;
    use draftsmith_formats::run::RunFile;
    use draftsmith_formats::tokens::{TokenRow as FileRow, TokenWriter};
    use draftsmith_kernels::testing::{host, noise};
    use draftsmith_model::{DraftConfig, Precision, Target, TargetTensors};
    use draftsmith_train::{Alone, Event, Flow, Hooks, TrainOptions, method, train};

    use super::*;

    type Device = Cuda<Shim>;

    fn device() -> Device {
        // Beside the programs of the tests, where the shim of other crates' tests lies too.
        let folder = std::env::current_exe().unwrap().with_file_name("cuda-shim");
        Cuda::new(Shim::new(&folder).unwrap(), CudaOptions::default())
    }

    fn spec(layers: &[u32], hidden_size: u32, dtype: CaptureDtype) -> CacheSpec {
        CacheSpec {
            target: String::new(),
            target_sha256: String::new(),
            precision: String::new(),
            tokenizer_sha256: String::new(),
            template_sha256: String::new(),
            tokens_sha256: String::new(),
            target_layer_ids: layers.to_vec(),
            hidden_size,
            dtype,
            shard_rows: 8,
            rows: 1,
        }
    }

    #[test]
    fn what_a_card_keeps_of_states_is_what_a_cache_gives_back() {
        // The last block of a state is shorter than the others.
        let (rows, width, layers) = (9, 70, [1, 4]);
        let mut states: Vec<Vec<f32>> = (0..3).map(|seed| noise(seed, rows * width)).collect();
        let scales = [1.0, 1e-3, 300.0, 3e36, 1e-30, 1e-38, 3e-41, 0.0, -0.0];
        for state in &mut states {
            for (row, scale) in state.chunks_exact_mut(width).zip(scales) {
                row.iter_mut().for_each(|v| *v *= scale);
                row[40] *= 60.0;
            }
        }
        let cuda = device();
        for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
            let spec = spec(&layers, width as u32, dtype);
            let keep = |states: &[Vec<f32>]| {
                let kept = if dtype == CaptureDtype::Int8 { KeptAs::Int8 } else { KeptAs::Bf16 };
                let on_card: Vec<Buf<Shim>> = states.iter().map(|x| cuda.upload(x)).collect();
                let on_card: Vec<&Buf<Shim>> = on_card.iter().collect();
                // Behind two rows of others.
                let (mut features, mut last) =
                    (cuda.zeros((rows + 2) * 2 * width), cuda.zeros((rows + 2) * width));
                let to = (&mut features, &mut last);
                cuda.keep_states(&on_card, (rows, width), kept, to, 2).map(|()| {
                    let all = host(&cuda, &features, (rows + 2) * 2 * width);
                    let last = host(&cuda, &last, (rows + 2) * width);
                    assert!(all[..4 * width].iter().chain(&last[..2 * width]).all(|v| v.to_bits() == 0));
                    (all[4 * width..].to_vec(), last[2 * width..].to_vec())
                })
            };
            let row = |states: &[Vec<f32>]| CaptureRow {
                ids: vec![0; rows],
                loss_mask: vec![true; rows],
                features: (0..rows)
                    .flat_map(|r| {
                        [0, 1].map(|l: usize| states[l][r * width..(r + 1) * width].to_vec()).concat()
                    })
                    .collect(),
                last: states[2].clone(),
            };
            let wanted = row(&states).stored_as(&spec).unwrap();
            let (features, last) = keep(&states).unwrap();
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(
                bits(&features) == bits(&wanted.features) && bits(&last) == bits(&wanted.last),
                "{dtype:?}"
            );
            assert!(features.iter().any(|v| *v != 0.0));
            // The same state of the same token is refused.
            for (state, value, wrong) in [(2, f32::NAN, 5), (1, f32::INFINITY, 5), (0, -3.35e38, 7)] {
                let mut states = states.clone();
                states[state][wrong * width + 69] = value;
                states[2][8 * width] = value;
                assert_eq!(keep(&states).unwrap_err(), UnfitState { row: wrong, state });
                let wanted = row(&states).stored_as(&spec).unwrap_err();
                assert_eq!(spec.unfit_state(0, wrong, state).to_string(), wanted.to_string());
            }
        }
    }

    fn target_path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target")
    }

    /// Some rows of the target's vocabulary.
    fn tokens(dir: &Path) -> TokenFile {
        let path = dir.join("train.tokens");
        let mut file = TokenWriter::create(&path, &BTreeMap::new()).unwrap();
        for (row, len) in [11usize, 30, 7, 19].into_iter().enumerate() {
            let ids = (0..len as u32).map(|i| 3 + (i * i * 7 + 31 * row as u32 + i * 5) % 1000).collect();
            let loss_mask = (0..len).map(|i| i >= 3).collect();
            file.push(&FileRow { id: row.to_string(), domain: String::new(), ids, loss_mask }).unwrap();
        }
        file.finish().unwrap();
        TokenFile::open(&path).unwrap()
    }

    /// Weights after some steps, the bytes that they copied to and from the card, and the slots that they trained on.
    fn trained(kind: &str, dtype: CaptureDtype, on_card: bool) -> (Vec<Vec<f32>>, [u64; 2], u64) {
        let dir = tempfile::tempdir().unwrap();
        // The longest row is cut to a pack.
        let text = format!(
            "[target]\nsource = \"-\"\n[data]\nsources = [{{ path = \"-\" }}]\nmax_length = 24\n\
             [draft]\nmethod = \"{kind}\"\nvocab_size = 293\ninit = \"random\"\nintermediate = 32\n\
             [draft.dflash]\nblock_size = 3\n[draft.dspark]\nblock_size = 3\nmarkov_rank = 8\n\
             [draft.p-eagle]\nlayers = 1\ndepths = 2\n\
             [train]\nlr = 4e-3\nepochs = 3\nmax_steps = 3\ntokens_per_step = 48\npack_length = 24\n\
             [train.replay]\nshare = 0.4\ntokens = 24\nevery = 1\nbuffer = 6\n\
             [train.eagle3]\nttt_length = 2\n"
        );
        let file = RunFile::parse(Path::new("run.toml"), &text, &[]).unwrap();
        let cuda = device();
        let target = Target::load(Arc::new(cuda.clone()), &target_path(), Precision::Stored).unwrap();
        let layers = [1, 3, 6];
        let ids: Vec<u32> = (0..1024).filter(|id| id % 7 < 2).collect();
        let map = VocabMap::from_target_ids(&ids, 1024).unwrap();
        let mut config = DraftConfig::from_table(&file.draft, target.config(), ids.len()).unwrap();
        config.set_target_layers(&layers).unwrap();
        config.set_mask_token(1023);
        let tensors = TargetTensors::load(&target_path()).unwrap();
        let mut method = method(cuda.clone(), config, &file, map, &tensors, None).unwrap();
        let capture = InProcess::new(Arc::new(target), layers.map(LayerId).to_vec());
        let spec = spec(&layers, 128, dtype);
        let rows = CardRows::new(tokens(dir.path()), capture, cuda.clone(), spec);
        let options = TrainOptions::from_run(&file, dir.path().to_path_buf(), "key".into());
        let mut slots = 0;
        let mut on_event = |event: &Event| {
            if let Event::Step(step) = event {
                slots = step.total_slots;
            }
            Flow::Continue
        };
        let hooks = Hooks { on_event: &mut on_event, validate: None, collective: &Alone };
        let before = cuda.launcher().copied();
        let mut store: Box<dyn RowStore> = match on_card {
            true => Box::new(rows),
            false => Box::new(rows.rows),
        };
        assert!(train(method.as_mut(), store.as_mut(), &options, hooks).unwrap().finished);
        let after = cuda.launcher().copied();
        let weights = method.draft().unwrap().tensors.into_iter().map(|t| t.values).collect();
        (weights, [after[0] - before[0], after[1] - before[1]], slots)
    }

    #[track_caller]
    fn check(kind: &str, dtype: CaptureDtype) {
        let (wanted, host, slots) = trained(kind, dtype, false);
        let (found, card, _) = trained(kind, dtype, true);
        let bits = |all: &[Vec<f32>]| all.concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&found) == bits(&wanted), "{kind}: other weights");
        assert!(slots > 0);
        // Down come three layers and the final state of 128 floats a token, or four bytes; up go the layers, or nothing of them.
        assert!(host[1] >= card[1] + slots * (4 * 128 * 4 - 4), "{kind}: {host:?}, {card:?}");
        assert!(host[0] >= card[0] + slots * 2 * 128 * 4, "{kind}: {host:?}, {card:?}");
    }

    #[test]
    fn a_chain_is_trained_alike_on_states_that_stay_on_the_card() {
        check("eagle3", CaptureDtype::Int8);
    }

    #[test]
    fn blocks_are_trained_alike_on_states_that_stay_on_the_card() {
        check("dspark", CaptureDtype::Bf16);
        check("dflash", CaptureDtype::Int8);
    }

    #[test]
    fn rollouts_are_trained_alike_on_states_that_stay_on_the_card() {
        check("p-eagle", CaptureDtype::Int8);
    }
}
