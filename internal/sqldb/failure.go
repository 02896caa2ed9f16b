package sqldb

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strings"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"code.cloudfoundry.org/silk/fault"
)

// Failure gives an error of a driver its kind: fault.Unavailable when the database cannot be reached, is overloaded or gave up waiting,
// otherwise what it was. Errors of DB and Tx have been through it.
func Failure(err error) error {
	switch {
	case err == nil || fault.Of(err) != fault.Internal:
		return err
	case errors.Is(err, context.Canceled):
		return err
	case IsLost(err) || IsConflict(err) || errors.Is(err, context.DeadlineExceeded):
		return fault.New(fault.Unavailable, err)
	}
	return err
}

// IsConflict reports whether the database gave up a transaction in favour of another one, so that it may succeed when it is begun
// again: a serialization failure, a deadlock, a lock that was not had in time, a busy SQLite file, a certification conflict of Galera.
func IsConflict(err error) bool {
	if errors.Is(err, errStale) {
		return true
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "40001" || e.Code == "40P01" || e.Code == "55P03"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1213 || e.Number == 1205 || e.Number == 1020 || e.Number != 1047 && strings.Contains(e.Message, "WSREP")
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()&0xff == sqlite3.SQLITE_BUSY || e.Code()&0xff == sqlite3.SQLITE_LOCKED
	}
	return false
}

func isCode(err error, code string) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == code
}

// isRefused reports whether trying again soon will not help to connect: a wrong password, no such database, a certificate that is not trusted.
func isRefused(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return strings.HasPrefix(e.Code, "28") || e.Code == "3D000"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1044 || e.Number == 1045 || e.Number == 1049
	}
	_, chain := errors.AsType[*tls.CertificateVerificationError](err)
	_, authority := errors.AsType[x509.UnknownAuthorityError](err)
	return chain || authority
}

// IsLost reports whether the connection to the database failed or the server turned it away.
func IsLost(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch e.Code {
		case "57P01", "57P02", "57P03", "57P05", "25P03", "3D000", "53300", "53400", "57014", "25006":
			return true
		}
		return strings.HasPrefix(e.Code, "08") || strings.HasPrefix(e.Code, "28") || strings.HasPrefix(e.Code, "53") || strings.HasPrefix(e.Code, "58")
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		switch e.Number {
		case 1040, 1044, 1045, 1046, 1047, 1049, 1053, 1077, 1129, 1130, 1152, 1158, 1159, 1160, 1161, 1203, 1226, 1290, 1317, 1836, 1927, 3024, 1969:
			return true
		}
		return false
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		switch e.Code() & 0xff {
		case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT:
			return true
		}
		return false
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, mysql.ErrInvalidConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, sql.ErrTxDone) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || pgconn.SafeToRetry(err) ||
		err != nil && strings.Contains(err.Error(), "conn closed")
}

// isReadOnly reports whether the server takes no writes, as one does that follows another.
func isReadOnly(err error) bool {
	if isCode(err, "25006") {
		return true
	}
	e, ok := errors.AsType[*mysql.MySQLError](err)
	return ok && (e.Number == 1290 || e.Number == 1836)
}

// IsDuplicate reports whether a row was refused because another one has the same unique value.
func IsDuplicate(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "23505"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1062
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
	}
	return false
}

// IsOrphan reports whether a row was refused because the one that it refers to is not there.
func IsOrphan(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "23503"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1452
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
	}
	return false
}

// IsMissing reports whether a statement named a table that does not exist.
func IsMissing(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "42P01"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1146
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return strings.Contains(e.Error(), "no such table")
	}
	return false
}

// isDefinitionRace reports whether two processes made the same table at once, in a way that IF NOT EXISTS does not cover.
func isDefinitionRace(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "42P07" || e.Code == "23505" || e.Code == "42710"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1050 || e.Number == 1062
	}
	return false
}
