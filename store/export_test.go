package store

import "context"

// Appends answers how many appends wait for their turn, and how many runs of them are under way: of the script that
// knows every case.
func (s *Store) Appends() (waiting, under int) { return s.pipes[scriptAppend].state() }

// Pushes answers the same of the script of ordinary appends.
func (s *Store) Pushes() (waiting, under int) { return s.pipes[scriptPush].state() }

func (p *pipe) state() (waiting, under int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting), p.under
}

// Thorough has the script that knows every case do all appends.
func (s *Store) Thorough() { s.thorough = true }

// CountOrdinary counts in n the appends that were ordinary, in others those that only looked so.
func (s *Store) CountOrdinary(n, others *int) {
	run := s.pipes[scriptPush].run
	s.pipes[scriptPush].run = func(ctx context.Context, calls []*call) {
		run(ctx, calls)
		for _, c := range calls {
			if c.err == nil && c.reply[0] == other {
				*others++
			} else {
				*n++
			}
		}
	}
}

// Resting says whether runs wait for nobody, since a turn was given up.
func (s *Store) Resting() bool { return s.pipes[scriptPush].turn.rest.Load() > 0 }
