package store

// Appends answers how many appends wait for their turn, and how many runs of them are under way.
func (s *Store) Appends() (waiting, under int) {
	p := s.pipes[scriptAppend]
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting), p.under
}
