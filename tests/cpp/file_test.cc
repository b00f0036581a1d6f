#include "io/file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "based/error.h"
#include "temporary_folder.h"

namespace based::io {
namespace {

namespace fs = std::filesystem;

using test::read_bytes;
using test::write_bytes;

class AtomicFiles : public testing::Test {
 protected:
  AtomicFiles() : mask_(umask(022)) {}
  ~AtomicFiles() override { umask(mask_); }

  static void write(const fs::path& path, const std::string& bytes) {
    AtomicFile file(path);
    file.write(bytes.data(), bytes.size());
    file.commit();
  }
  static struct stat status_of(const fs::path& path) {
    struct stat info{};
    EXPECT_EQ(::stat(path.c_str(), &info), 0) << path;
    return info;
  }
  static unsigned mode_of(const fs::path& path) { return status_of(path).st_mode & 07777; }

  test::TemporaryFolder folder_;
  const fs::path path_ = folder_ / "file";
  const mode_t mask_;
};

TEST_F(AtomicFiles, AppearWholeOrNotAtAll) {
  {
    AtomicFile file(path_);
    file.write("new", 3);
    EXPECT_FALSE(fs::exists(path_));
    EXPECT_LE(folder_.num_files(), 1);  // none where a file may be without a name
  }
  EXPECT_EQ(folder_.num_files(), 0);
  write(path_, "old");
  {
    AtomicFile file(path_);
    file.write("new", 3);
    EXPECT_EQ(read_bytes(path_), "old");
    file.commit();
    EXPECT_EQ(read_bytes(path_), "new");
  }
  EXPECT_EQ(folder_.num_files(), 1);
}

TEST_F(AtomicFiles, LeaveNothingWhenTheirProcessIsKilled) {
  const pid_t child = fork();
  if (child == 0) {
    AtomicFile file(path_);
    file.write("new", 3);
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  write(path_, "next");  // removes what is left where files need names
  EXPECT_EQ(folder_.num_files(), 1);
}

TEST_F(AtomicFiles, ExchangePaths) {
  write(path_, "file");
  fs::create_directory(folder_ / "folder");
  if (!exchange_paths(path_, folder_ / "folder")) GTEST_SKIP() << "this filesystem cannot";
  EXPECT_TRUE(fs::is_directory(path_));
  EXPECT_EQ(read_bytes(folder_ / "folder"), "file");
  EXPECT_THROW_WITH(exchange_paths(path_, folder_ / "none"), IoError, "cannot exchange");
}

TEST_F(AtomicFiles, WriteWhatALinkLeadsTo) {
  fs::create_directory(folder_ / "a");
  fs::create_directory(folder_ / "b");
  const fs::path target = folder_ / "b" / "target";
  fs::create_symlink(fs::path("..") / "b" / "target", folder_ / "a" / "relative");
  fs::create_symlink(folder_ / "a" / "relative", folder_ / "absolute");  // a link to a link
  fs::create_directory_symlink("a", folder_ / "folder");
  for (const fs::path& path : {folder_ / "a" / "relative", folder_ / "absolute", folder_ / "folder" / "relative"}) {
    for (const char* bytes : {"first", "second"}) {  // of a target that does not exist, and of one that does
      write(path, bytes);
      EXPECT_EQ(read_bytes(target), bytes);
    }
    EXPECT_TRUE(fs::is_symlink(path));
    EXPECT_EQ(std::distance(fs::directory_iterator(target.parent_path()), fs::directory_iterator()), 1);
    fs::remove(target);
  }
}

TEST_F(AtomicFiles, RefuseLinksThatLeadNowhere) {
  fs::create_symlink("loop", folder_ / "loop");
  EXPECT_THROW_WITH(AtomicFile(folder_ / "loop"), IoError, "cannot write");
  fs::create_symlink("none/file", folder_ / "dangling");
  EXPECT_THROW_WITH(AtomicFile(folder_ / "dangling"), IoError, "cannot create a temporary file for");
  fs::create_directory(folder_ / "folder");
  fs::create_directory_symlink("folder", folder_ / "link");
  EXPECT_THROW_WITH(AtomicFile(folder_ / "link"), IoError, "cannot replace (not a regular file)");
}

TEST_F(AtomicFiles, KeepThePermissionsOfWhatTheyReplace) {
  write(path_, "old");
  EXPECT_EQ(mode_of(path_), 0644u);
  for (const unsigned mode : {0600u, 0444u, 0664u, 0777u, 0000u}) {
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
    write(path_, "new");
    EXPECT_EQ(mode_of(path_), mode);
  }
  umask(077);
  write(folder_ / "private", "new");
  EXPECT_EQ(mode_of(folder_ / "private"), 0600u);
}

TEST_F(AtomicFiles, KeepTheOwnerOfWhatTheyReplace) {
  if (geteuid() != 0) GTEST_SKIP() << "only root may give files away";
  write(path_, "old");
  ASSERT_EQ(chown(path_.c_str(), 1234, 4321), 0);
  ASSERT_EQ(chmod(path_.c_str(), 0640), 0);
  write(path_, "new");
  EXPECT_EQ(read_bytes(path_), "new");
  const struct stat info = status_of(path_);
  EXPECT_EQ(info.st_uid, 1234u);
  EXPECT_EQ(info.st_gid, 4321u);
  EXPECT_EQ(mode_of(path_), 0640u);
}

TEST_F(AtomicFiles, DoNotHandTheRightsOfAGroupToAnother) {
  if (geteuid() != 0) GTEST_SKIP() << "only root may become another user";
  ASSERT_EQ(chmod(folder_.path().c_str(), 0777), 0);
  write(path_, "old");
  ASSERT_EQ(chown(path_.c_str(), 1234, 4321), 0);
  ASSERT_EQ(chmod(path_.c_str(), 0664), 0);
  ASSERT_EQ(seteuid(1000), 0);  // of root's groups, none of which is 4321
  write(path_, "new");
  ASSERT_EQ(seteuid(0), 0);
  const struct stat info = status_of(path_);
  EXPECT_EQ(info.st_uid, 1000u);
  EXPECT_EQ(info.st_gid, getegid());
  EXPECT_EQ(mode_of(path_), 0604u);
}

}  // namespace
}  // namespace based::io
