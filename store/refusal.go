package store

// hintFailed is told why Redis refused an announcement.
func (s *Store) hintFailed(text string) {}

// writesRefused is told why Redis refused a write that a read would have made.
func (s *Store) writesRefused(text string) {}

// tolerant reports whether reads may be served by a Redis that is read-only.
func (s *Store) tolerant() bool { return false }
