//! Every byte draftsmith reads and writes: run file, corpus, target cache, checkpoint, bundle, records, GGUF and safetensors containers
