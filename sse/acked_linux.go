package sse

import (
	"net"

	"golang.org/x/sys/unix"
)

// acknowledged returns how many bytes the peer's kernel has taken since the connection began
// (tcp(7), TCP_INFO), or 0 if that is unknown.
func acknowledged(c net.Conn) (bytes uint64) {
	tcp := tcpConn(c)
	if tcp == nil {
		return 0
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			bytes = info.Bytes_acked
		}
	})
	return bytes
}
