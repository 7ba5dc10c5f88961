//! Safetensors weights: one file, or a folder with one file or an index of shards; and atomic writing.
//!
//! A folder is read as the Hugging Face tools write it: `model.safetensors`, or `model.safetensors.index.json`
//! with shards beside it. The bytes are mapped, the header is checked by the `safetensors` crate, and errors name
//! file and tensor. Shapes are as stored: row-major, a weight that maps `in` to `out` features is `[out, in]`.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors, View};

use crate::atomic::{self, AtomicError};
use crate::mapped::{Mapped, OpenError};

/// What is wrong with safetensors weights, or with a question asked of them.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// A file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] AtomicError),
    /// A folder without weights.
    #[error("folder `{}` has neither `model.safetensors` nor `model.safetensors.index.json`", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A header that is no safetensors header.
    #[error("safetensors file `{}`: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        problem: String,
        /// Whether the file is the text that git-lfs leaves in place of the bytes.
        lfs: bool,
    },
    /// An index that is no index.
    #[error("shard index `{}`: {problem}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A shard name that is not a plain file name.
    #[error("shard index `{}` puts tensor `{tensor}` into `{shard}`, which is not a plain file name", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// Tensor.
        tensor: String,
        /// What stands there as its file.
        shard: String,
    },
    /// The index promises a tensor that the shard does not have.
    #[error("tensor `{tensor}` is not in `{}`, where the index puts it", path.display())]
    NotInShard {
        /// The shard.
        path: PathBuf,
        /// Tensor.
        tensor: String,
    },
    /// A tensor that is needed and not there.
    #[error("tensor `{name}` is missing in `{}`", path.display())]
    MissingTensor {
        /// File or folder.
        path: PathBuf,
        /// Tensor.
        name: String,
    },
    /// A tensor of another shape than the caller needs.
    #[error("tensor `{name}` in `{}` has shape {found:?}, expected {wanted:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that is needed.
        wanted: Vec<usize>,
    },
    /// A tensor of a type that cannot be converted to what the caller needs.
    #[error("tensor `{name}` in `{}` has type {found}, expected {wanted}", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Type in the file.
        found: Dtype,
        /// Types that would do.
        wanted: &'static str,
    },
}

impl SafetensorsError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            SafetensorsError::Open(e) if e.source.kind() == std::io::ErrorKind::NotFound => {
                Some("put it beside the others: all files that the index names are needed".to_string())
            }
            SafetensorsError::Open(_) => Some("check the path and whether the file may be read".to_string()),
            SafetensorsError::Write(e) => e.hint(),
            SafetensorsError::NoWeights { .. } => {
                Some(
                    "give the folder of a model in safetensors form, or a `.gguf` file; weights in `.bin` or `.pt` must be \
                     converted to safetensors first"
                        .to_string(),
                )
            }
            SafetensorsError::Header { lfs: true, .. } => {
                Some("the file is a pointer of git-lfs: run `git lfs pull` in its repository".to_string())
            }
            SafetensorsError::Header { .. } | SafetensorsError::Index { .. } => {
                Some("the file is cut off or damaged: download it again and compare its sha256".to_string())
            }
            SafetensorsError::ShardName { .. } => {
                Some("shards must lie beside the index; do not trust this model folder".to_string())
            }
            SafetensorsError::NotInShard { .. } => {
                Some("shards and index come from different downloads: download the model again".to_string())
            }
            SafetensorsError::MissingTensor { .. }
            | SafetensorsError::Shape { .. }
            | SafetensorsError::Type { .. } => {
                Some("take `config.json` and weights from the same repository and revision".to_string())
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Location {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Range in the file.
    start: usize,
    end: usize,
}

#[derive(Clone, Debug)]
struct Shard {
    path: PathBuf,
    mapped: Mapped,
    metadata: HashMap<String, String>,
}

/// One tensor: type, shape and bytes.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape; empty for a scalar.
    pub shape: &'a [usize],
    /// Little-endian bytes; their start is not aligned.
    pub bytes: &'a [u8],
    /// The file it lies in.
    pub path: &'a Path,
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Checks the shape.
    pub fn expect_shape(&self, wanted: &[usize]) -> Result<(), SafetensorsError> {
        if self.shape == wanted {
            return Ok(());
        }
        Err(SafetensorsError::Shape {
            path: self.path.to_path_buf(),
            name: self.name.to_string(),
            found: self.shape.to_vec(),
            wanted: wanted.to_vec(),
        })
    }

    pub(crate) fn wrong_type(&self, wanted: &'static str) -> SafetensorsError {
        SafetensorsError::Type {
            path: self.path.to_path_buf(),
            name: self.name.to_string(),
            found: self.dtype,
            wanted,
        }
    }

    fn read<const N: usize, T>(&self, from: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.bytes.chunks_exact(N).map(|c| from(c.try_into().expect("chunks have N bytes"))).collect()
    }

    /// The elements as f32; F32, F16 and BF16 are converted exactly, F64 is rounded.
    pub fn to_f32(&self) -> Result<Vec<f32>, SafetensorsError> {
        match self.dtype {
            Dtype::F32 => Ok(self.read(f32::from_le_bytes)),
            Dtype::F16 => Ok(self.read(|b| half::f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Ok(self.read(|b| half::bf16::from_le_bytes(b).to_f32())),
            Dtype::F64 => Ok(self.read(|b| f64::from_le_bytes(b) as f32)),
            _ => Err(self.wrong_type("F32, F16, BF16 or F64")),
        }
    }

    /// The elements as i64, from I64 or I32.
    pub fn to_i64(&self) -> Result<Vec<i64>, SafetensorsError> {
        match self.dtype {
            Dtype::I64 => Ok(self.read(i64::from_le_bytes)),
            Dtype::I32 => Ok(self.read(|b| i64::from(i32::from_le_bytes(b)))),
            _ => Err(self.wrong_type("I64 or I32")),
        }
    }

    /// The elements as bool, from BOOL or U8; any non-zero byte is true.
    pub fn to_bool(&self) -> Result<Vec<bool>, SafetensorsError> {
        match self.dtype {
            Dtype::BOOL | Dtype::U8 => Ok(self.bytes.iter().map(|b| *b != 0).collect()),
            _ => Err(self.wrong_type("BOOL or U8")),
        }
    }
}

/// Opened safetensors weights: all shards mapped, all headers checked.
#[derive(Clone, Debug)]
pub struct SafetensorsDir {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Location>,
}

impl SafetensorsDir {
    /// Opens a `.safetensors` file, a `.index.json` file, or a folder that holds one of them.
    pub fn open(path: impl AsRef<Path>) -> Result<SafetensorsDir, SafetensorsError> {
        let path = path.as_ref();
        let mut out =
            SafetensorsDir { path: path.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new() };
        let index = path.join("model.safetensors.index.json");
        let single = path.join("model.safetensors");
        if path.is_dir() {
            // A folder with both holds one model twice; the single file is the simpler truth.
            if single.is_file() {
                out.add_file(&single)?;
            } else if index.is_file() {
                out.add_index(&index)?;
            } else {
                return Err(SafetensorsError::NoWeights { path: path.to_path_buf() });
            }
        } else if path.extension().is_some_and(|e| e == "json") {
            out.add_index(path)?;
        } else {
            out.add_file(path)?;
        }
        Ok(out)
    }

    /// Like [`SafetensorsDir::open`] for one file whose bytes are in memory; `path` is for errors.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<SafetensorsDir, SafetensorsError> {
        let path = path.into();
        let mut out = SafetensorsDir { path: path.clone(), shards: Vec::new(), tensors: BTreeMap::new() };
        let found = out.load(&path, bytes.into())?;
        out.tensors.extend(found);
        Ok(out)
    }

    /// Checks one file and returns its tensors.
    fn load(&mut self, path: &Path, mapped: Mapped) -> Result<Vec<(String, Location)>, SafetensorsError> {
        let header = |e: SafeTensorError| SafetensorsError::Header {
            path: path.to_path_buf(),
            problem: header_problem(&e, mapped.bytes()),
            lfs: mapped.bytes().starts_with(b"version https://git-lfs"),
        };
        let (header_len, metadata) = SafeTensors::read_metadata(mapped.bytes()).map_err(header)?;
        let data_start = header_len + size_of::<u64>();
        let shard = self.shards.len();
        let mut found = Vec::new();
        for (name, info) in metadata.tensors() {
            // `read_metadata` has checked that the ranges tile the rest of the file.
            let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
            let location = Location { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            found.push((name, location));
        }
        let metadata = metadata.metadata().clone().unwrap_or_default();
        self.shards.push(Shard { path: path.to_path_buf(), mapped, metadata });
        Ok(found)
    }

    fn add_file(&mut self, path: &Path) -> Result<(), SafetensorsError> {
        let found = self.load(path, Mapped::open(path)?)?;
        self.tensors.extend(found);
        Ok(())
    }

    fn add_index(&mut self, path: &Path) -> Result<(), SafetensorsError> {
        let problem = |problem: String| SafetensorsError::Index { path: path.to_path_buf(), problem };
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let mapped = Mapped::open(path)?;
        let index: Index = serde_json::from_slice(mapped.bytes()).map_err(|e| problem(e.to_string()))?;
        if index.weight_map.is_empty() {
            return Err(problem("`weight_map` is empty".to_string()));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            if !is_plain_name(shard) {
                return Err(SafetensorsError::ShardName {
                    path: path.to_path_buf(),
                    tensor: tensor.clone(),
                    shard: shard.clone(),
                });
            }
            by_shard.entry(shard).or_default().push(tensor);
        }
        for (shard, wanted) in by_shard {
            let shard_path = folder.join(shard);
            let mut found: HashMap<String, Location> =
                self.load(&shard_path, Mapped::open(&shard_path)?)?.into_iter().collect();
            for name in wanted {
                let location = found.remove(name).ok_or_else(|| SafetensorsError::NotInShard {
                    path: shard_path.clone(),
                    tensor: name.to_string(),
                })?;
                self.tensors.insert(name.to_string(), location);
            }
        }
        Ok(())
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order they were opened.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path.as_path())
    }

    /// Free text fields of the header (`__metadata__`), of all shards together.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.iter().find_map(|s| s.metadata.get(key)).map(String::as_str)
    }

    /// Tensor names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// A tensor, if it is there.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, at) = self.tensors.get_key_value(name)?;
        let shard = &self.shards[at.shard];
        let bytes = &shard.mapped.bytes()[at.start..at.end];
        Some(Tensor { name, dtype: at.dtype, shape: &at.shape, bytes, path: &shard.path })
    }

    /// Gives the memory of a tensor's bytes back to the system; reading them again fetches them from the file.
    pub fn release(&self, name: &str) {
        if let Some(location) = self.tensors.get(name) {
            self.shards[location.shard].mapped.release(location.start..location.end);
        }
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`SafetensorsError::MissingTensor`]
    pub fn get(&self, name: &str) -> Result<Tensor<'_>, SafetensorsError> {
        self.find(name).ok_or_else(|| SafetensorsError::MissingTensor {
            path: self.path.clone(),
            name: name.to_string(),
        })
    }
}

/// True for one normal path component and nothing else: no folder, no `..`, no drive.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    plain && !name.contains(['/', '\\', ':', '\0'])
}

/// The parser's verdict in our words, with the numbers that it leaves out.
fn header_problem(e: &SafeTensorError, bytes: &[u8]) -> String {
    let said = || bytes.get(..8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    let len = bytes.len();
    match e {
        SafeTensorError::HeaderTooSmall => format!("it has {len} bytes, a header needs at least 8"),
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooLarge => format!(
            "the header says that it has {} bytes, but the file has {len}",
            said().unwrap_or_default()
        ),
        SafeTensorError::MetadataIncompleteBuffer => format!(
            "the tensors do not end where the file ends: it is cut off or has extra bytes ({len} bytes in all)"
        ),
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor `{name}` does not start where the one before it ends")
        }
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's byte range does not have the length that its shape and type need".to_string()
        }
        SafeTensorError::ValidationOverflow => "a tensor's size overflows 64 bits".to_string(),
        other => other.to_string(),
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorData {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Little-endian bytes.
    pub bytes: Vec<u8>,
}

impl TensorData {
    fn new(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> TensorData {
        let wanted = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        assert!(bytes.len() == wanted, "`{name}` needs {wanted} bytes, not {}", bytes.len());
        TensorData { name: name.to_string(), dtype, shape: shape.to_vec(), bytes }
    }

    /// An F32 tensor.
    ///
    /// # Panics
    /// Like the other constructors: if shape and number of values disagree.
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> TensorData {
        TensorData::new(name, Dtype::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A BF16 tensor, rounded to nearest even.
    pub fn bf16(name: &str, shape: &[usize], values: &[f32]) -> TensorData {
        let bytes = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        TensorData::new(name, Dtype::BF16, shape, bytes)
    }

    /// An F16 tensor, rounded to nearest even.
    pub fn f16(name: &str, shape: &[usize], values: &[f32]) -> TensorData {
        let bytes = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        TensorData::new(name, Dtype::F16, shape, bytes)
    }

    /// An I64 tensor.
    pub fn i64(name: &str, shape: &[usize], values: &[i64]) -> TensorData {
        TensorData::new(name, Dtype::I64, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A BOOL tensor.
    pub fn bool(name: &str, shape: &[usize], values: &[bool]) -> TensorData {
        TensorData::new(name, Dtype::BOOL, shape, values.iter().map(|v| u8::from(*v)).collect())
    }
}

impl View for &TensorData {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The bytes of a safetensors file. `metadata` goes to `__metadata__`; it may be empty.
///
/// The same tensors give the same bytes, whatever order they come in.
///
/// # Panics
/// If two tensors have one name.
pub fn to_bytes(tensors: &[TensorData], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut names: Vec<_> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|w| w[0] != w[1]), "two tensors have one name");
    let views = tensors.iter().map(|t| (t.name.as_str(), t));
    // The crate keeps metadata in a hash map, whose order is random: one key is deterministic, more are packed in
    // by ourselves below.
    let head = metadata.iter().next().filter(|_| metadata.len() == 1);
    let head = head.map(|(k, v)| HashMap::from([(k.clone(), v.clone())]));
    let bytes = safetensors::serialize(views, head).expect("shapes match bytes: checked when they were made");
    if metadata.len() < 2 { bytes } else { with_metadata(&bytes, metadata) }
}

/// Rewrites the header with `__metadata__` in sorted order.
fn with_metadata(bytes: &[u8], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + len]).expect("the header is JSON").trim_end();
    let fields = serde_json::to_string(metadata).expect("a map of strings is JSON");
    let rest = header.strip_prefix('{').expect("the header is an object");
    let comma = if rest == "}" { "" } else { "," };
    let mut new = format!("{{\"__metadata__\":{fields}{comma}{rest}");
    while new.len() % 8 != 0 {
        new.push(' ');
    }
    let mut out = (new.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(new.as_bytes());
    out.extend_from_slice(&bytes[8 + len..]);
    out
}

/// A tensor that is made when its turn to be written comes.
#[derive(Clone, Debug)]
pub struct TensorHead {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorHead {
    /// An F32 tensor.
    pub fn f32(name: &str, shape: &[usize]) -> TensorHead {
        TensorHead { name: name.to_string(), dtype: Dtype::F32, shape: shape.to_vec() }
    }

    /// An I64 tensor.
    pub fn i64(name: &str, shape: &[usize]) -> TensorHead {
        TensorHead { name: name.to_string(), dtype: Dtype::I64, shape: shape.to_vec() }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// The places of tensors in the order in which a file has them.
pub fn file_order(heads: &[TensorHead]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..heads.len()).collect();
    // The widest types first, then by name: that of `safetensors::serialize`.
    order.sort_by(|a, b| heads[*b].dtype.cmp(&heads[*a].dtype).then(heads[*a].name.cmp(&heads[*b].name)));
    order
}

/// Writes a file of the bytes that [`to_bytes`] gives without metadata, tensor by tensor: `fill` writes the little-endian bytes of
/// the tensor at a place, and is called in [`file_order`]. So no more than one of them need be in memory.
///
/// # Errors
/// Those of `out` and `fill`.
///
/// # Panics
/// If two tensors have one name, or `fill` writes another number of bytes than the shape says.
pub fn write_each<W: Write>(
    out: &mut W,
    heads: &[TensorHead],
    mut fill: impl FnMut(usize, &mut Counted<'_, W>) -> io::Result<()>,
) -> io::Result<()> {
    let order = file_order(heads);
    let mut infos = Vec::new();
    let mut from = 0;
    for at in &order {
        let TensorHead { name, dtype, shape } = &heads[*at];
        let to = from + heads[*at].bytes();
        infos.push((
            name.clone(),
            TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (from, to) },
        ));
        from = to;
    }
    let metadata = Metadata::new(None, infos).expect("no name is there twice, and ranges follow each other");
    let mut header = serde_json::to_vec(&metadata).expect("names and numbers are JSON");
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for at in order {
        let mut counted = Counted { out: &mut *out, bytes: 0 };
        fill(at, &mut counted)?;
        let TensorHead { name, .. } = &heads[at];
        let wanted = heads[at].bytes();
        assert!(counted.bytes == wanted, "`{name}` needs {wanted} bytes, not {}", counted.bytes);
    }
    Ok(())
}

/// The bytes of one tensor on their way to a file.
#[derive(Debug)]
pub struct Counted<'a, W> {
    out: &'a mut W,
    bytes: usize,
}

impl<W: Write> Counted<'_, W> {
    /// Writes F32 values.
    ///
    /// # Errors
    /// Those of the file.
    pub fn f32(&mut self, values: &[f32]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for values in values.chunks(1 << 14) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            self.out.write_all(&bytes)?;
            self.bytes += bytes.len();
        }
        Ok(())
    }

    /// Writes I64 values.
    ///
    /// # Errors
    /// Those of the file.
    pub fn i64(&mut self, values: &[i64]) -> io::Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes += bytes.len();
        self.out.write_all(&bytes)
    }
}

/// Writes a safetensors file atomically.
pub fn write(
    path: impl AsRef<Path>,
    tensors: &[TensorData],
    metadata: &BTreeMap<String, String>,
) -> Result<(), SafetensorsError> {
    Ok(atomic::write(path, to_bytes(tensors, metadata))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<TensorData> {
        vec![
            TensorData::f32("a", &[2, 2], &[1.0, -2.0, 0.5, 3.0]),
            TensorData::bf16("b", &[2], &[1.0, -2.0]),
            TensorData::f16("c", &[2], &[0.5, 65504.0]),
            TensorData::i64("d2t", &[3], &[0, 1, -1]),
            TensorData::bool("t2d", &[3], &[true, false, true]),
        ]
    }

    fn write_raw(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A file with the given header text and `data` zero bytes after it.
    fn raw(header: &str, data: usize) -> Vec<u8> {
        let mut b = (header.len() as u64).to_le_bytes().to_vec();
        b.extend_from_slice(header.as_bytes());
        b.resize(b.len() + data, 0);
        b
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = write_raw(dir.path(), "m.safetensors", bytes);
        let err = SafetensorsDir::open(&path).expect_err("must be refused");
        assert_eq!(err.to_string(), format!("safetensors file `{}`: {expected}", path.display()));
        assert!(err.hint().is_some());
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let meta = BTreeMap::from([("format".to_string(), "pt".to_string()), ("z".into(), "1".into())]);
        write(&path, &sample(), &meta).unwrap();
        for opened in [&path, &dir.path().to_path_buf()] {
            let st = SafetensorsDir::open(opened).unwrap();
            assert_eq!(st.names().collect::<Vec<_>>(), ["a", "b", "c", "d2t", "t2d"]);
            assert_eq!(st.metadata("format"), Some("pt"));
            assert_eq!(st.metadata("z"), Some("1"));
            assert_eq!(st.get("a").unwrap().to_f32().unwrap(), [1.0, -2.0, 0.5, 3.0]);
            assert_eq!(st.get("b").unwrap().to_f32().unwrap(), [1.0, -2.0]);
            assert_eq!(st.get("c").unwrap().to_f32().unwrap(), [0.5, 65504.0]);
            assert_eq!(st.get("d2t").unwrap().to_i64().unwrap(), [0, 1, -1]);
            assert_eq!(st.get("t2d").unwrap().to_bool().unwrap(), [true, false, true]);
            assert_eq!(st.get("a").unwrap().shape, [2, 2]);
        }
    }

    #[test]
    fn the_bytes_do_not_depend_on_the_order_of_tensors() {
        let meta: BTreeMap<_, _> = (0..20).map(|i| (format!("k{i}"), format!("v{i}"))).collect();
        let mut reversed = sample();
        reversed.reverse();
        assert_eq!(to_bytes(&sample(), &meta), to_bytes(&reversed, &meta));
        assert_eq!(to_bytes(&sample(), &BTreeMap::new()), to_bytes(&reversed, &BTreeMap::new()));
    }

    #[test]
    fn tensors_written_one_by_one_give_the_same_bytes() {
        let tensors = [
            TensorData::f32("w.b", &[2, 2], &[1.0, -2.0, 0.5, 3.0]),
            TensorData::f32("m.z", &[3], &[0.25, f32::MIN_POSITIVE, -0.0]),
            TensorData::i64("positions", &[1, 3], &[0, 1, -1]),
            TensorData::f32("empty", &[0], &[]),
        ];
        let heads: Vec<TensorHead> = tensors
            .iter()
            .map(|t| TensorHead { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
            .collect();
        let (mut out, mut came) = (Vec::new(), Vec::new());
        write_each(&mut out, &heads, |at, file| {
            came.push(heads[at].name.as_str());
            match at {
                0 => file.f32(&[1.0, -2.0, 0.5, 3.0]),
                1 => file.f32(&[0.25, f32::MIN_POSITIVE, -0.0]),
                2 => file.i64(&[0, 1, -1]),
                _ => Ok(()),
            }
        })
        .unwrap();
        assert_eq!(came, ["positions", "empty", "m.z", "w.b"]);
        assert!(out == to_bytes(&tensors, &BTreeMap::new()));
        let mut none = Vec::new();
        write_each(&mut none, &[], |_, _| Ok(())).unwrap();
        assert!(none == to_bytes(&[], &BTreeMap::new()));
    }

    #[test]
    #[should_panic(expected = "`w.b` needs 16 bytes, not 4")]
    fn a_tensor_of_another_length_is_our_own_fault() {
        let head = [TensorHead::f32("w.b", &[2, 2])];
        let _ = write_each(&mut Vec::new(), &head, |_, file| file.f32(&[1.0]));
    }

    #[test]
    fn questions_that_do_not_fit_name_file_and_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        write(&path, &sample(), &BTreeMap::new()).unwrap();
        let st = SafetensorsDir::open(&path).unwrap();
        let file = path.display();
        let err = st.get("nope").unwrap_err().to_string();
        assert_eq!(err, format!("tensor `nope` is missing in `{file}`"));
        let err = st.get("a").unwrap().expect_shape(&[4]).unwrap_err().to_string();
        assert_eq!(err, format!("tensor `a` in `{file}` has shape [2, 2], expected [4]"));
        let err = st.get("a").unwrap().to_i64().unwrap_err().to_string();
        assert_eq!(err, format!("tensor `a` in `{file}` has type F32, expected I64 or I32"));
    }

    #[test]
    fn shards_are_joined_by_the_index() {
        let dir = tempfile::tempdir().unwrap();
        let all = sample();
        write(dir.path().join("one.safetensors"), &all[..2], &BTreeMap::new()).unwrap();
        write(dir.path().join("two.safetensors"), &all[2..], &BTreeMap::new()).unwrap();
        let index = r#"{"metadata":{"total_size":1},"weight_map":
            {"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors","d2t":"two.safetensors"}}"#;
        let path = write_raw(dir.path(), "model.safetensors.index.json", index.as_bytes());
        for opened in [path.as_path(), dir.path()] {
            let st = SafetensorsDir::open(opened).unwrap();
            assert_eq!(st.names().collect::<Vec<_>>(), ["a", "b", "c", "d2t"]);
            assert_eq!(st.get("c").unwrap().to_f32().unwrap(), [0.5, 65504.0]);
            assert_eq!(st.files().count(), 2);
        }
        let index = r#"{"weight_map":{"c":"one.safetensors"}}"#;
        write_raw(dir.path(), "model.safetensors.index.json", index.as_bytes());
        let err = SafetensorsDir::open(dir.path()).unwrap_err().to_string();
        assert!(
            err.starts_with("tensor `c` is not in `") && err.ends_with("where the index puts it"),
            "{err}"
        );
    }

    #[test]
    fn an_index_cannot_lead_out_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        for shard in ["../m.safetensors", "/etc/passwd", "a/b", "..", ".", "", "c:\\x", "a\\..\\b"] {
            let index = serde_json::json!({"weight_map": {"w": shard}}).to_string();
            write_raw(dir.path(), "model.safetensors.index.json", index.as_bytes());
            let err = SafetensorsDir::open(dir.path()).unwrap_err();
            assert!(matches!(err, SafetensorsError::ShardName { .. }), "{shard}: {err}");
        }
        for text in ["", "[]", "{\"weight_map\":{}}", "{\"weight_map\":{\"a\":1}}"] {
            write_raw(dir.path(), "model.safetensors.index.json", text.as_bytes());
            let err = SafetensorsDir::open(dir.path()).unwrap_err();
            assert!(matches!(err, SafetensorsError::Index { .. }), "{text}: {err}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(SafetensorsDir::open(empty.path()), Err(SafetensorsError::NoWeights { .. })));
    }

    #[test]
    fn damaged_headers_are_refused() {
        check_refused(b"", "it has 0 bytes, a header needs at least 8");
        check_refused(
            &[0xff; 20],
            "the header says that it has 18446744073709551615 bytes, but the file has 20",
        );
        check_refused(
            &raw(r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
            "the tensors do not end where the file ends: it is cut off or has extra bytes (66 bytes in all)",
        );
        check_refused(
            &raw(r#"{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8),
            "a tensor's byte range does not have the length that its shape and type need",
        );
        check_refused(
            &raw(r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#, 8),
            "a tensor's size overflows 64 bits",
        );
        check_refused(
            &raw(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
            "tensor `w` does not start where the one before it ends",
        );
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let bytes = to_bytes(&sample(), &BTreeMap::new());
        let dir = tempfile::tempdir().unwrap();
        for len in 0..bytes.len() {
            let path = write_raw(dir.path(), "m.safetensors", &bytes[..len]);
            assert!(SafetensorsDir::open(&path).is_err(), "cut at {len}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        #[test]
        fn damaged_files_never_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
        ) {
            let mut bytes = to_bytes(&sample(), &BTreeMap::new());
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let dir = tempfile::tempdir().unwrap();
            let path = write_raw(dir.path(), "m.safetensors", &bytes);
            if let Ok(st) = SafetensorsDir::open(&path) {
                for name in st.names() {
                    let t = st.get(name).unwrap();
                    let _ = (t.to_f32(), t.to_i64(), t.to_bool());
                }
            }
        }
    }
}
