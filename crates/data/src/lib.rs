//! Sources to conversations to token ids and loss mask; packing, reports, vocabulary map
