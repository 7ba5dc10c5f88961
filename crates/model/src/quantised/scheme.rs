//! What a configuration says about quantised weights: the method, its numbers, and which layers it covers.

use std::path::Path;

use draftsmith_formats::hf_config::HfConfig;
use serde_json::Value;

use super::pattern::Pattern;
use crate::ModelError;

/// A method whose weights are read.
#[derive(Debug)]
pub(crate) enum Method {
    /// The layout `gemm`: nibbles of eight outputs in a word, in an order of their own.
    Awq { group: Group },
    /// Words of inputs.
    Gptq {
        bits: u32,
        group: Group,
        /// Zeros stand as they are; before, one less than they are.
        v2: bool,
        /// Some layers have numbers of their own, which their shapes tell.
        dynamic: bool,
    },
    /// 8-bit floats, with scales per weight, output or block.
    Fp8 { block: [usize; 2] },
    /// compressed-tensors: groups of layers, each with a form of its own.
    Compressed { forms: Vec<Form> },
}

/// Inputs that share a scale: so many, or all of them.
pub(crate) type Group = Option<usize>;

/// One entry of `config_groups`.
#[derive(Debug)]
pub(crate) struct Form {
    /// Its name in the configuration.
    pub key: String,
    targets: Vec<Target>,
    pub bits: u32,
    pub float: bool,
    pub strategy: Strategy,
    pub symmetric: bool,
}

/// What the weights of a layer share a scale with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strategy {
    /// All.
    Tensor,
    /// Those of the same output.
    Channel,
    /// So many inputs of an output.
    Group(usize),
    /// Outputs and inputs of a block.
    Block([usize; 2]),
}

/// A layer, layers by a pattern, or all of a class.
#[derive(Debug)]
enum Target {
    Name(String),
    Pattern(String, Pattern),
}

/// The scheme of a folder.
#[derive(Debug)]
pub(crate) struct Scheme {
    /// File of the configuration.
    pub place: String,
    /// Where in it the scheme stands, with a dot behind.
    pub prefix: &'static str,
    pub method: Method,
    /// Layers that are left out: what names them, and whether it is Python that matches (or the whole name).
    skip: Vec<Skip>,
}

#[derive(Debug)]
enum Skip {
    /// `modules_to_not_convert`: a pattern up to a dot, or the end of a name.
    Loose(String, Pattern),
    /// `ignore`.
    Target(Target),
}

impl Target {
    fn parse(text: &str) -> Result<Target, String> {
        match text.strip_prefix("re:") {
            Some(pattern) => Ok(Target::Pattern(text.to_owned(), Pattern::parse(pattern)?)),
            None => Ok(Target::Name(text.to_owned())),
        }
    }

    /// How closely it means a layer: by name, by pattern, by class; `None` if not at all.
    fn rank(&self, layer: &str) -> Option<u8> {
        match self {
            Target::Name(name) if name == layer => Some(0),
            Target::Pattern(_, pattern) if pattern.matches(layer) => Some(1),
            // The layers that are read are of this class, or (embeddings) never asked for.
            Target::Name(name) if matches!(name.as_str(), "Linear" | "LinearBase") => Some(2),
            _ => None,
        }
    }

    fn text(&self) -> &str {
        match self {
            Target::Name(text) | Target::Pattern(text, _) => text,
        }
    }
}

/// Reads keys of a table and says where it stands.
struct Reader<'a> {
    place: String,
    prefix: &'static str,
    table: &'a HfConfig,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::QuantisedConfig {
            place: self.place.clone(),
            key: format!("{}{key}", self.prefix),
            problem: problem.into(),
        }
    }

    /// A whole number under one of several names.
    fn number(&self, keys: &[&str]) -> Result<Option<i64>, ModelError> {
        for key in keys {
            match self.table.get(key) {
                None => {}
                Some(value) => {
                    let n = value
                        .as_i64()
                        .ok_or_else(|| self.wrong(key, format!("is {value}, no whole number")))?;
                    return Ok(Some(n));
                }
            }
        }
        Ok(None)
    }

    /// A group size, -1 for whole rows.
    fn group(&self, keys: &[&str]) -> Result<Option<Group>, ModelError> {
        match self.number(keys)? {
            None => Ok(None),
            Some(-1) => Ok(Some(None)),
            Some(n @ 1..=0xff_ffff) => Ok(Some(Some(n as usize))),
            Some(n) => {
                Err(self.wrong(keys[0], format!("is {n}, expected a group size, or -1 for whole rows")))
            }
        }
    }

    /// Two positive numbers.
    fn block(&self, key: &str) -> Result<Option<[usize; 2]>, ModelError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let side = |v: &Value| v.as_u64().filter(|n| (1..1 << 24).contains(n)).map(|n| n as usize);
        match value.as_array().map(Vec::as_slice) {
            Some([a, b]) => match (side(a), side(b)) {
                (Some(a), Some(b)) => Ok(Some([a, b])),
                _ => Err(self.wrong(key, format!("is {value}, expected two sizes of a block"))),
            },
            _ => Err(self.wrong(key, format!("is {value}, expected two sizes of a block"))),
        }
    }

    fn targets(&self, key: &str) -> Result<Vec<Target>, ModelError> {
        let names = self.table.find_str_list(key)?.unwrap_or_default();
        let parse = |text: &String| {
            Target::parse(text).map_err(|e| self.wrong(key, format!("has the pattern `{text}`: {e}")))
        };
        names.iter().map(parse).collect()
    }
}

impl Scheme {
    /// The scheme that a configuration names, or a file of an older tool in the folder; `None` if its method is not read, or none is named.
    ///
    /// # Errors
    /// A method that is read, with numbers or a layout that are not.
    pub(crate) fn read(root: &HfConfig, folder: Option<&Path>) -> Result<Option<Scheme>, ModelError> {
        let mut found = None;
        for (table, key, prefix) in [
            (Some(root), "quantization_config", "quantization_config."),
            (Some(root), "compression_config", "compression_config."),
            (
                root.find_table("text_config")?.as_ref(),
                "quantization_config",
                "text_config.quantization_config.",
            ),
        ] {
            if let Some(table) = table.map(|t| t.find_table(key)).transpose()?.flatten() {
                found = Some((table, prefix));
                break;
            }
        }
        if let (None, Some(folder)) = (&found, folder) {
            // Files of older tools.
            for (file, method) in [("quantize_config.json", "gptq"), ("quant_config.json", "awq")] {
                let path = folder.join(file);
                if path.is_file() {
                    let table = HfConfig::open(&path)?;
                    return Scheme::of(&table, "", method);
                }
            }
        }
        let Some((table, prefix)) = found else { return Ok(None) };
        let has = |key: &str| table.get(key).is_some();
        let method = match table.find_str("quant_method")? {
            Some(method) => method,
            None if has("config_groups") => "compressed-tensors",
            None if has("desc_act") => "gptq",
            None if has("w_bit") || has("zero_point") => "awq",
            None => return Ok(None),
        };
        Scheme::of(&table, prefix, method)
    }

    fn of(table: &HfConfig, prefix: &'static str, method: &str) -> Result<Option<Scheme>, ModelError> {
        let place = table.path().display().to_string();
        let reader = Reader { place: place.clone(), prefix, table };
        let mut skip = Vec::new();
        for key in ["modules_to_not_convert", "ignored_layers"] {
            for text in table.find_str_list(key)?.unwrap_or_default() {
                let pattern = Pattern::parse(&text)
                    .map_err(|e| reader.wrong(key, format!("has the pattern `{text}`: {e}")))?;
                skip.push(Skip::Loose(text, pattern));
            }
        }
        let method = match method {
            "awq" => awq(&reader)?,
            "gptq" => gptq(&reader)?,
            "fp8" | "fbgemm_fp8" => {
                if let Some(format @ ("e5m2" | "e3m4")) = table.find_str("fmt")? {
                    return Err(
                        reader.wrong("fmt", format!("is `{format}`; 8-bit floats are read as `e4m3`"))
                    );
                }
                Method::Fp8 { block: reader.block("weight_block_size")?.unwrap_or([128, 128]) }
            }
            "compressed-tensors" => {
                skip.extend(reader.targets("ignore")?.into_iter().map(Skip::Target));
                match compressed(&reader)? {
                    Some(forms) => Method::Compressed { forms },
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        Ok(Some(Scheme { place, prefix, method, skip }))
    }

    /// What in the configuration leaves a layer out: key and entry.
    pub(crate) fn skips(&self, layer: &str) -> Option<(&'static str, &str)> {
        self.skip.iter().find_map(|skip| match skip {
            Skip::Loose(text, pattern) => {
                let chars: Vec<char> = layer.chars().collect();
                let border =
                    |end: usize| end == chars.len() || chars[end] == '.' || end > 0 && chars[end - 1] == '.';
                let met = layer.ends_with(text.as_str()) || pattern.ends(layer).into_iter().any(border);
                met.then_some(("modules_to_not_convert", text.as_str()))
            }
            Skip::Target(target) => target.rank(layer).map(|_| ("ignore", target.text())),
        })
    }

    /// The form that compressed-tensors gives a layer: the closest target decides.
    pub(crate) fn form<'s>(&self, forms: &'s [Form], layer: &str) -> Option<&'s Form> {
        let ranked = forms.iter().flat_map(|form| {
            form.targets.iter().filter_map(move |t| t.rank(layer).map(|rank| (rank, t.text(), form)))
        });
        ranked.min_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1))).map(|(_, _, form)| form)
    }
}

fn awq(reader: &Reader<'_>) -> Result<Method, ModelError> {
    let version = reader.table.find_str("version")?.unwrap_or("gemm").to_ascii_lowercase();
    // Same files, other kernels.
    if !["gemm", "exllama", "ipex"].contains(&version.as_str()) {
        return Err(reader.wrong("version", format!("is `{version}`; of AWQ the layout `gemm` is read")));
    }
    match reader.number(&["bits", "w_bit"])? {
        None | Some(4) => {}
        Some(bits) => return Err(reader.wrong("bits", format!("is {bits}; of AWQ 4 bits are read"))),
    }
    let group = reader.group(&["group_size", "q_group_size"])?.unwrap_or(Some(128));
    Ok(Method::Awq { group })
}

fn gptq(reader: &Reader<'_>) -> Result<Method, ModelError> {
    let bits = match reader.number(&["bits"])? {
        Some(bits @ (4 | 8)) => bits as u32,
        Some(bits) => return Err(reader.wrong("bits", format!("is {bits}; of GPTQ 4 and 8 bits are read"))),
        None => return Err(reader.wrong("bits", "is missing")),
    };
    let mut v2 = false;
    for key in ["checkpoint_format", "format"] {
        match reader.table.find_str(key)? {
            None => {}
            Some("gptq") => v2 = false,
            Some("gptq_v2") => v2 = true,
            Some(other) => {
                let problem = format!("is `{other}`; of GPTQ the layouts `gptq` and `gptq_v2` are read");
                return Err(reader.wrong(key, problem));
            }
        }
    }
    if let Some(dtype) = reader.table.find_str("pack_dtype")?.filter(|d| *d != "int32") {
        return Err(reader.wrong("pack_dtype", format!("is `{dtype}`; of GPTQ words of `int32` are read")));
    }
    let group = reader.group(&["group_size"])?.unwrap_or(Some(128));
    Ok(Method::Gptq { bits, group, v2, dynamic: reader.table.get("dynamic").is_some() })
}

/// Forms of `config_groups`; `None` for a format that is not read.
fn compressed(reader: &Reader<'_>) -> Result<Option<Vec<Form>>, ModelError> {
    const READ: [&str; 6] =
        ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision"];
    if reader.table.find_str("format")?.is_some_and(|format| !READ.contains(&format)) {
        return Ok(None);
    }
    if let Some(sparse) = reader.table.find_table("sparsity_config")?
        && sparse.find_str("format")?.is_some_and(|format| format != "dense")
    {
        return Err(reader.wrong("sparsity_config.format", "is not `dense`; sparse weights are not read"));
    }
    let Some(groups) = reader.table.find_table("config_groups")? else {
        return Err(reader.wrong("config_groups", "is missing"));
    };
    let mut forms = Vec::new();
    for key in groups.map().keys() {
        let wrong =
            |name: &str, problem: String| reader.wrong(&format!("config_groups.{key}.{name}"), problem);
        let Some(table) = groups.find_table(key)? else { continue };
        if table.find_str("format")?.is_some_and(|format| !READ.contains(&format)) {
            return Ok(None);
        }
        let Some(weights) = table.find_table("weights")? else { continue };
        let own = Reader { place: reader.place.clone(), prefix: "", table: &weights };
        let place = |e: ModelError| match e {
            ModelError::QuantisedConfig { key: name, problem, .. } => {
                wrong(&format!("weights.{name}"), problem)
            }
            other => other,
        };
        let float = match weights.find_str("type")?.unwrap_or("int") {
            "int" => false,
            "float" => true,
            other => return Err(wrong("weights.type", format!("is `{other}`, expected `int` or `float`"))),
        };
        let bits = own.number(&["num_bits"]).map_err(place)?.unwrap_or(8);
        if !(bits == 8 || bits == 4 && !float) {
            let read = "whole numbers of 4 and 8 bits and floats of 8 bits are read";
            return Err(wrong("weights.num_bits", format!("is {bits}; {read}")));
        }
        let size = own.group(&["group_size"]).map_err(place)?;
        let needed = |size: Option<Group>| {
            size.flatten().ok_or_else(|| wrong("weights.group_size", "is missing".into()))
        };
        let strategy = match weights.find_str("strategy")? {
            Some("tensor") => Strategy::Tensor,
            Some("channel") => Strategy::Channel,
            Some("group") => Strategy::Group(needed(size)?),
            Some("block") => match own.block("block_structure").map_err(place)? {
                Some(block) => Strategy::Block(block),
                None => return Err(wrong("weights.block_structure", "is missing".into())),
            },
            // As compressed-tensors itself fills it in.
            None => match size {
                None => Strategy::Tensor,
                Some(None) => Strategy::Channel,
                Some(Some(len)) => Strategy::Group(len),
            },
            Some(other) => {
                let read = "`tensor`, `channel`, `group` and `block` are read";
                return Err(wrong("weights.strategy", format!("is `{other}`; {read}")));
            }
        };
        let symmetric = weights.find_bool("symmetric")?.unwrap_or(true);
        if float && !symmetric {
            return Err(wrong("weights.symmetric", "is false for floats".into()));
        }
        let named = Reader { place: reader.place.clone(), prefix: "", table: &table };
        let targets = named.targets("targets").map_err(|e| match e {
            ModelError::QuantisedConfig { key: name, problem, .. } => wrong(&name, problem),
            other => other,
        })?;
        forms.push(Form { key: key.clone(), targets, bits: bits as u32, float, strategy, symmetric });
    }
    Ok(Some(forms))
}
