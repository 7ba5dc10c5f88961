//! Target sources behind one interface: capture of hidden states, regeneration of answers
