package policysql

import "time"

// Hurry makes a store that does not run yet wait for d only where it waits for seconds or minutes.
func (s *Store) Hurry(d time.Duration) { s.patience, s.auditEvery = d, d }

// Sizes returns how many sets of groups are kept, and how many groups in them.
func (s *Store) Sizes() (sets, topics int) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	return len(s.feed.sets), len(s.feed.topics)
}
