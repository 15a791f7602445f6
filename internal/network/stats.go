package network

import (
	"fmt"
)

// Stats reads the counters of all interfaces but the loopback in a network namespace, by name,
// as the programs inside see them.
func (s *Service) Stats(netNS string) (map[string]Counters, error) {
	ns, err := openNetNS(netNS)
	if err != nil {
		return nil, fmt.Errorf("network counters: %w", err)
	}
	defer ns.Close()
	h, err := handleAt(ns)
	if err != nil {
		return nil, fmt.Errorf("network counters: %w", err)
	}
	defer h.Close()
	links, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("network counters: %w", err)
	}
	m := map[string]Counters{}
	for _, l := range links {
		a := l.Attrs()
		if a.Name == "lo" || a.Statistics == nil {
			continue
		}
		st := a.Statistics
		m[a.Name] = Counters{
			RxBytes: st.RxBytes, RxPackets: st.RxPackets, RxErrors: st.RxErrors, RxDropped: st.RxDropped,
			TxBytes: st.TxBytes, TxPackets: st.TxPackets, TxErrors: st.TxErrors, TxDropped: st.TxDropped,
		}
	}
	return m, nil
}
