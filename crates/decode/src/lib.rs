//! Decode engine: sessions, draft, verify, commit and rollback; the Target and Drafter traits
