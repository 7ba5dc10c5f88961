//! Training on devices that reach each other: the bits of one process, and of sums over hosts.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use draftsmith_cuda::Cuda;
use draftsmith_cuda::shim::{Shim, ShimLink, links};
use draftsmith_train::eagle3::random_weights;
use draftsmith_train::ranks::threads::on_ranks;
use draftsmith_train::{
    Alone, Collective, Eagle3Options, Flow, Hooks, Method, ReplayOptions, SumTree, TrainOptions, train,
};

use crate::golden::cuda_shim;
use crate::infer::Random;
use crate::learning::{Memory, options};

/// Devices whose threads reach each other, by number of ranks and rank.
#[derive(Default)]
pub(crate) struct Linked(Mutex<HashMap<usize, Vec<Option<ShimLink>>>>);

impl Linked {
    /// That of a rank, once; a process alone has no peers.
    pub(crate) fn device(&self, collective: &dyn Collective) -> Cuda<Shim> {
        let (rank, ranks) = (collective.rank(), collective.ranks());
        if ranks == 1 {
            return cuda_shim();
        }
        let mut all = self.0.lock().unwrap();
        let ends = all.entry(ranks).or_insert_with(|| links(ranks).into_iter().map(Some).collect());
        cuda_shim().with_peers(ends[rank].take().expect("each rank asks once"))
    }
}

/// Trains. Returns the bytes that came from the device.
fn run(collective: &dyn Collective, device: Cuda<Shim>, random: &Random, options: &TrainOptions) -> u64 {
    let shim = device.launcher().clone();
    let mut method = random.method_on(device, Eagle3Options { ttt_length: 2, ..Eagle3Options::default() });
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective };
    let outcome = train(&mut method, &mut Memory(random.rows.clone()), options, hooks).unwrap();
    assert!(outcome.finished);
    shim.copied()[1]
}

/// The last checkpoint and the last draft.
fn tensors(dir: &Path, steps: u64) -> [Vec<u8>; 2] {
    let step = dir.join(format!("checkpoints/step-{steps:08}/tensors.safetensors"));
    [step, dir.join("last/model.safetensors")].map(|path| std::fs::read(path).unwrap())
}

/// What rank 0 sent in the first step.
fn sent(dir: &Path) -> Option<u64> {
    let log = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    first["ranks"]["sent_bytes"].as_u64()
}

#[test]
fn any_number_of_devices_gives_the_bits_of_one_and_of_sums_over_hosts() {
    const STEPS: u64 = 2;
    let replay = ReplayOptions { share: 0.4, tokens: 24, every: 1, buffer: 6 };
    // Where it is wide, matrices are cut where ranks share the optimiser.
    for (packs, replay, width, counts) in
        [(4, None, 72, 2..=4), (5, Some(replay), 72, 2..=4), (3, None, 1400, 2..=2)]
    {
        let mut random = Random::new(8, &[9, 20, 14, 30, 7, 25, 11, 18, 29, 16]);
        random.config.intermediate_size = width;
        random.weights = random_weights(&random.config, 8);
        let options = |dir: &Path, shard_optimizer| TrainOptions {
            tokens_per_step: 16 * packs,
            pack_slots: 16,
            max_steps: Some(STEPS),
            epochs: 9,
            validate_every: None,
            replay,
            shard_optimizer,
            ..options(dir)
        };
        let whole = tempfile::tempdir().unwrap();
        run(&Alone, cuda_shim(), &random, &options(whole.path(), false));
        let wanted = tensors(whole.path(), STEPS);
        let method = random.method(1, Eagle3Options::default());
        let tape = method.tape();
        let trained: usize = tape.trained().into_iter().map(|id| tape.param(id).numel()).sum();
        for ranks in counts {
            for shard in [false, true] {
                let [hosts, devices] = [false, true].map(|is_linked| {
                    let (dir, linked) = (tempfile::tempdir().unwrap(), Linked::default());
                    let copied = on_ranks(ranks, |collective| {
                        let device = if is_linked { linked.device(collective) } else { cuda_shim() };
                        run(collective, device, &random, &options(dir.path(), shard))
                    });
                    let what =
                        format!("{packs} micro-batches over {ranks}, shared {shard}, linked {is_linked}");
                    assert!(tensors(dir.path(), STEPS) == wanted, "{what}");
                    (copied, sent(dir.path()))
                });
                // Over hosts every piece comes there, and where the moments are shared a slice of gradients, twice, and of parameters.
                let tree = SumTree::new(packs, ranks);
                for (rank, (hosts, devices)) in hosts.0.iter().zip(&devices.0).enumerate() {
                    let pieces = tree.pieces_of(rank).count();
                    let least = 4 * STEPS * (pieces * trained) as u64;
                    assert!(hosts - devices >= least, "rank {rank} of {ranks}: {hosts}, {devices}");
                    assert!(shard || hosts - devices == least, "rank {rank} of {ranks}: {hosts}, {devices}");
                }
                let (hosts, devices) = (hosts.1.unwrap(), devices.1.unwrap());
                match shard {
                    true => assert_eq!(devices, hosts),
                    // Slices end at lines, so a rank may have some values more or less of each parameter.
                    false => assert!(devices.abs_diff(hosts) < hosts / 10, "{devices}, {hosts}"),
                }
            }
        }
    }
}
