//! The order in which the gradients of a step are summed: one binary tree over its micro-batches, whoever computes them.
//!
//! Sums of floats depend on their order. The tree is a function of the number of micro-batches alone: the even ones and the
//! odd ones are summed apart, each half in the same way, then both sums are added, even first. Micro-batch `i` belongs to
//! rank `i mod N`, so with a power of two of ranks everything that a rank computes is one whole subtree: it adds its own
//! micro-batches up and sends one gradient. With other numbers a rank sends a few partial sums; the additions are the same.

/// Which micro-batches a process sums by itself: `first`, `first + stride` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Who computes it.
    pub rank: usize,
    first: usize,
    stride: usize,
}

/// What to do next for the sum of a piece. The sum under way is what gradients are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visit {
    /// Add the gradients of this micro-batch to the sum under way.
    MicroBatch(usize),
    /// Put the sum under way aside and begin another one from zero.
    Hold,
    /// Add the sum that was put aside last to the one under way.
    Add,
}

#[derive(Debug)]
enum Node {
    /// By its place among the pieces.
    Piece(usize),
    Sum(Box<Node>, Box<Node>),
}

/// The tree of one step, cut into what each process sums by itself and what is added between them.
#[derive(Debug)]
pub struct SumTree {
    micro_batches: usize,
    pieces: Vec<Piece>,
    top: Option<Node>,
}

impl SumTree {
    /// The tree over so many micro-batches, shared by so many ranks.
    pub fn new(micro_batches: usize, ranks: usize) -> SumTree {
        let mut tree = SumTree { micro_batches, pieces: Vec::new(), top: None };
        if micro_batches > 0 {
            tree.top = Some(tree.grow(0, 1, ranks.max(1)));
        }
        tree
    }

    fn grow(&mut self, first: usize, stride: usize, ranks: usize) -> Node {
        let is_leaf = first + stride >= self.micro_batches;
        if is_leaf || stride.is_multiple_of(ranks) {
            self.pieces.push(Piece { rank: first % ranks, first, stride });
            return Node::Piece(self.pieces.len() - 1);
        }
        let even = self.grow(first, 2 * stride, ranks);
        let odd = self.grow(first + stride, 2 * stride, ranks);
        Node::Sum(Box::new(even), Box::new(odd))
    }

    /// All pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Those of a rank.
    pub fn pieces_of(&self, rank: usize) -> impl Iterator<Item = Piece> + '_ {
        self.pieces.iter().copied().filter(move |piece| piece.rank == rank)
    }

    /// How a piece is summed.
    pub fn visits(&self, piece: Piece) -> Vec<Visit> {
        let mut visits = Vec::new();
        self.visit(piece.first, piece.stride, &mut visits);
        visits
    }

    fn visit(&self, first: usize, stride: usize, visits: &mut Vec<Visit>) {
        if first + stride >= self.micro_batches {
            visits.push(Visit::MicroBatch(first));
            return;
        }
        self.visit(first, 2 * stride, visits);
        visits.push(Visit::Hold);
        self.visit(first + stride, 2 * stride, visits);
        visits.push(Visit::Add);
    }

    /// Adds up the sums of all pieces, in their order; zeros if there are none.
    ///
    /// # Panics
    /// If there are not as many as pieces, each `len` long.
    pub fn add(&self, pieces: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
        assert!(pieces.iter().all(|piece| piece.len() == len), "pieces are equally long");
        let sum = self.fold(pieces, |mut sum, odd| {
            sum.iter_mut().zip(&odd).for_each(|(sum, x)| *sum += x);
            sum
        });
        sum.unwrap_or_else(|| vec![0.0; len])
    }

    /// The same of whatever stands for the sums: `add` gets an even one and the odd one that is added to it. `None` if there are
    /// no pieces.
    ///
    /// # Panics
    /// If there are not as many as pieces.
    pub fn fold<T>(&self, pieces: Vec<T>, mut add: impl FnMut(T, T) -> T) -> Option<T> {
        assert_eq!(pieces.len(), self.pieces.len(), "one sum for each piece");
        let mut pieces: Vec<Option<T>> = pieces.into_iter().map(Some).collect();
        self.top.as_ref().map(|top| fold(top, &mut pieces, &mut add))
    }
}

fn fold<T>(node: &Node, pieces: &mut [Option<T>], add: &mut impl FnMut(T, T) -> T) -> T {
    match node {
        Node::Piece(place) => pieces[*place].take().expect("each piece is in the tree once"),
        Node::Sum(even, odd) => {
            let even = fold(even, pieces, add);
            let odd = fold(odd, pieces, add);
            add(even, odd)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes the sum of a piece as a formula.
    fn formula(tree: &SumTree, piece: Piece) -> String {
        let (mut now, mut held) = (String::new(), Vec::new());
        for visit in tree.visits(piece) {
            match visit {
                Visit::MicroBatch(i) => now = i.to_string(),
                Visit::Hold => held.push(std::mem::take(&mut now)),
                Visit::Add => now = format!("({}+{now})", held.pop().unwrap()),
            }
        }
        assert!(held.is_empty());
        now
    }

    fn whole(tree: &SumTree) -> String {
        fn of(tree: &SumTree, node: &Node) -> String {
            match node {
                Node::Piece(place) => formula(tree, tree.pieces[*place]),
                Node::Sum(a, b) => format!("({}+{})", of(tree, a), of(tree, b)),
            }
        }
        tree.top.as_ref().map_or_else(String::new, |top| of(tree, top))
    }

    #[test]
    fn the_order_depends_on_the_micro_batches_alone() {
        let wanted =
            ["", "0", "(0+1)", "((0+2)+1)", "((0+2)+(1+3))", "(((0+4)+2)+(1+3))", "(((0+4)+2)+((1+5)+3))"];
        for (count, wanted) in wanted.iter().enumerate() {
            for ranks in 1..=9 {
                assert_eq!(whole(&SumTree::new(count, ranks)), *wanted, "{count} over {ranks}");
            }
        }
        for count in 0..40 {
            let alone = whole(&SumTree::new(count, 1));
            for ranks in 2..=9 {
                assert_eq!(whole(&SumTree::new(count, ranks)), alone, "{count} over {ranks}");
            }
        }
    }

    #[test]
    fn each_rank_sums_its_own_and_a_power_of_two_of_them_sends_one_sum_each() {
        for count in 0..40 {
            for ranks in 1..=9usize {
                let tree = SumTree::new(count, ranks);
                let mut seen = vec![0; count];
                for rank in 0..ranks {
                    let mine: Vec<Piece> = tree.pieces_of(rank).collect();
                    for piece in &mine {
                        for visit in tree.visits(*piece) {
                            if let Visit::MicroBatch(i) = visit {
                                assert_eq!(i % ranks, rank);
                                seen[i] += 1;
                            }
                        }
                    }
                    let most = if ranks.is_power_of_two() { 1 } else { count.div_ceil(ranks) };
                    assert!(mine.len() <= most, "{count} over {ranks}: {} pieces", mine.len());
                }
                assert!(seen.iter().all(|n| *n == 1), "{seen:?}");
            }
        }
    }
}
